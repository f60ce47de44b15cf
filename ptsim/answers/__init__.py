"""What one asks: cost, prediction, plan, validation, sweep; and what a MODEL or TRACE argument means."""
