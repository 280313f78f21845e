"""The gRPC door: `peftserve.v1.Inference` and `peftserve.v1.Adapters`, health and reflection."""
