"""Reporting: results to tables, plots and pages."""
