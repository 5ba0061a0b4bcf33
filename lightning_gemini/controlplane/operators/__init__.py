"""Where machines come from: this host's processes today; schedulers and clouds have their own module each."""
