"""Consultations between patient and doctor, each built on one exam question whose answer is known."""
