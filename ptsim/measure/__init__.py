"""What this machine really does: NVML, timers, profiles, calibration."""
