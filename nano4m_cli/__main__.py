"""`nano4m`, also as `python -m nano4m_cli`."""

from nano4m_cli.cli._app import app


def main() -> None:
    import os

    try:
        app(prog_name="nano4m")
    except SystemExit as err:
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            _leave(err.code)
        raise


def _leave(code: object) -> None:
    """End a process of a group at once, its buffers written, without taking Python down.

    A collective that is still on its way when a process fails belongs to a thread of gloo (ProcessGroupGloo::runLoop). At its end
    that thread lets go of the last reference to a Python thing: the function that DDP's hook gave to `then`, or the tensor of an
    async_op. For that it wants the interpreter's lock. Once Python has begun to go down, whoever asks for the lock is ended by
    pthread_exit instead (before 3.14), which unwinds through a C++ destructor, and that is std::terminate: "terminate called
    without an active exception", SIGABRT in the place of the exit code. destroy_process_group waits for such collectives, but as
    long as the others take, and where one is gone that may be train.timeout; so it is called at a good end only.
    """
    import atexit
    import os
    import sys
    import time

    if code and os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # what concerns all is said by the first, which torchrun ends as soon as another has failed
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
