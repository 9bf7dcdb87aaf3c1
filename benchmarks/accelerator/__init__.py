"""Parts of `gpu.py`: one module for each section, and how a section is run within its time and memory."""
