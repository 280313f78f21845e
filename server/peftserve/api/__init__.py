"""The front doors: HTTP and gRPC, both thin over one generation service and one error table."""
