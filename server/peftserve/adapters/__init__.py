"""Adapters: what they are, whether they are sound, and where they are kept. Imports no torch."""
