"""lm-eval's own command line with our model class: `--model solar_jax`.

    python -m solar_jax.lm_eval run --model solar_jax --model_args pretrained=SRC,dtype=float32 --tasks NAME,...

Everything else is lm-eval's; it needs the extra `eval`.
"""

import sys


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as e:
        sys.stderr.write(f"error: lm-eval is not installed ({e}); it comes with the extra `eval`.\n")
        sys.exit(2)
    from solar_jax.errors import UserError
    from solar_jax.evaluation import harness

    assert harness.NAME  # importing it registers the class
    try:
        cli_evaluate()
    except UserError as e:
        sys.stderr.write(f"error: {e}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
