"""The NATS client's adapters, and what processes learn and ask through them."""
