"""Three small adapters for the embedded default model, one of each kind, and the script that trains them."""
