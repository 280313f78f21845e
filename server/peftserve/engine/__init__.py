"""The engine: scheduler, caches and step loop. Knows nothing of sockets, names or text."""
