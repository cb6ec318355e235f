"""The second engine where no Ollama is found: a server process with Ollama's API, in front of llama.cpp with a GGUF
file, or of the demo model. Spilled requests go to it over HTTP. It never claims to be Ollama.
"""
