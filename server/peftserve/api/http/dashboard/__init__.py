"""The live dashboard: a page for browsers and its counterpart for Grafana, both over what `/metrics` already shows."""
