"""Reporting: tables, plots and pages of results."""
