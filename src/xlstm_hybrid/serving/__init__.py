"""An OpenAI-compatible server whose concurrent requests share decode steps."""
