"""The model: checkpoint loading, the decoder, adapter memory and the runner that executes a plan."""
