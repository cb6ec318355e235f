"""The stand-in for an absent Ollama: a server of its own process that speaks Ollama's protocol in front of the demo
model, so that spilling is real HTTP to a real second engine. It never claims to be Ollama.
"""
