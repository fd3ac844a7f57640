"""Requests to language models behind OpenAI-compatible endpoints. No stored reply is lost or paid for twice."""
