"""Requests to language models behind OpenAI-compatible endpoints. No reply is lost, and none is paid for twice."""
