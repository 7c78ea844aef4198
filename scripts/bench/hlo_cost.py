"""Estimates a step's time from HLO text optimised by the TPU compiler; see `solar_jax/planning/hlo_cost.py`.

    python scripts/bench/hlo_cost.py HLO.txt --chip v5p --tokens 16384 --flops 1.12e15

Works on any program's text, including other frameworks'.
"""

import argparse
import pathlib

from solar_jax.hardware.chips import CHIPS
from solar_jax.planning.hlo_cost import read_program

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A step's time from optimised TPU HLO text.")
    parser.add_argument("hlo", type=pathlib.Path)
    parser.add_argument("--chip", choices=CHIPS, required=True)
    parser.add_argument("--tokens", type=float, required=True, help="a device and step")
    parser.add_argument("--flops", type=float, required=True, help="model FLOPs a device and step")
    args = parser.parse_args()
    print(read_program(args.hlo.read_text(), CHIPS[args.chip]).report(args.tokens, args.flops))
