"""The command ``minicogview``: one module for each group of subcommands."""
