"""`nano4m`, also as `python -m nano4m_cli`."""

from nano4m_cli.cli._app import app


def main() -> None:
    app(prog_name="nano4m")


if __name__ == "__main__":
    main()
