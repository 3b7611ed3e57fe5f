"""Training an adapter on its frozen base; fine-tuning models to test it on."""
