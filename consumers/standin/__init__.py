"""The stand-in for a missing Ollama: a server process with Ollama's API in front of the demo model, so that spilled
requests go over HTTP to a second engine. It never claims to be Ollama.
"""
