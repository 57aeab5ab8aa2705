"""Operators that every method shares: selection, budgets, schedules, relaxations and formats; no paper names here."""
