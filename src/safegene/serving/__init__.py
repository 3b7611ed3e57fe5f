"""Serving: the embedded engine (`engine`), the OpenAI-compatible server around it (`app`), what proves it armed (`armed`)."""
