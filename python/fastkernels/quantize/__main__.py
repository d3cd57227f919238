"""python -m fastkernels.quantize"""

from fastkernels.quantize.command import app

if __name__ == "__main__":
    app(prog_name="python -m fastkernels.quantize")
