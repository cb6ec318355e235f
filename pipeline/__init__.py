"""The pipeline's own words and machinery: messages, decisions, broker, command line."""

__version__ = "0.1.0"
