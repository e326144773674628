"""IPython's settings in the tutorials."""

config = get_config()
config.IPKernelApp.log_level = 'ERROR'  # no warning about the kernel's connection
