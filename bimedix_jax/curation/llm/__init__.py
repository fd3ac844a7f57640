"""Asking language models through OpenAI-compatible endpoints so that no answer is lost and none is paid for twice."""
