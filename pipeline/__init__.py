"""The pipeline's own words and machinery: messages, decisions, broker, command line."""
