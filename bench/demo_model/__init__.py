"""The training and the evaluation of the demo model. Its weights are in `consumers.demo_model`."""
