"""PruneTrain: channel groups, group lasso, reconfiguration."""
