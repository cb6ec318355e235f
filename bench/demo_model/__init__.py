"""How the demo model is made and measured; its weights are in `consumers.demo_model`."""
