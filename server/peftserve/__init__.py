"""peftserve: one NF4 base model, many adapters of different kinds, mixed in one batch."""

__version__ = "0.1.0"
