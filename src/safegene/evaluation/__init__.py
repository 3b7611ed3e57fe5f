"""Measuring safety, over-refusal and cost."""
