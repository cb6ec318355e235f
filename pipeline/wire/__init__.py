"""The words that processes exchange: subjects, requests, answers, errors, and Ollama's bodies. No I/O."""
