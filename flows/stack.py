"""The server stack: what docker/compose.yaml starts, and the same without Docker.

    python -m flows.stack local      PostgreSQL, an S3 server, MLflow, Prefect and a worker on loopback, until Ctrl-C
    python -m flows.stack buckets    make the buckets that MLflow and DVC use (in compose.yaml)

PostgreSQL comes from Debian's packages, the S3 server from moto, which keeps what it is given in memory: `local` is for
trying and testing, and says so.
"""

from __future__ import annotations

import argparse
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.serve import QUIET, Child, Processes
from flows.server import free_port
from tasks.stage import UserError

BUCKETS = ("mlflow", "dvc")
DATABASES = ("prefect", "mlflow")


def buckets() -> None:
    """Make them where they are missing, at the address and with the credentials of the environment."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client: Any = boto3.client("s3")
        known = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for name in BUCKETS:
            if name not in known:
                client.create_bucket(Bucket=name)
    except (BotoCoreError, ClientError) as error:
        raise UserError(f"the S3 store does not answer as it should: {error}") from None


class Stack:
    """The servers, each on a free port of loopback, with what they keep in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.password, self.key, self.secret = (secrets.token_hex(16) for _ in range(3))
        self.ports = {name: free_port() for name in ("postgres", "s3", "mlflow", "prefect")}

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def database(self, driver: str, name: str) -> str:
        return f"postgresql+{driver}://rlhf:{self.password}@127.0.0.1:{self.ports['postgres']}/{name}"

    @property
    def client(self) -> dict[str, str]:
        """What a worker or a person needs to work with it."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.address("s3"),
            "MLFLOW_S3_ENDPOINT_URL": self.address("s3"),
            "MLFLOW_TRACKING_URI": self.address("mlflow"),
            "PREFECT_API_URL": f"{self.address('prefect')}/api",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        }

    def servers(self) -> list[Child]:
        s3 = Child(
            "S3", ["moto.server", "-H", "127.0.0.1", "-p", str(self.ports["s3"])], self.address("s3"), "/moto-api/"
        )
        mlflow = Child(
            "MLflow",
            [
                *("mlflow", "server", "--host=127.0.0.1", f"--port={self.ports['mlflow']}", "--workers=1"),
                "--artifacts-destination=s3://mlflow",
            ],
            self.address("mlflow"),
            "/health",
            {**self.client, "MLFLOW_BACKEND_STORE_URI": self.database("psycopg", "mlflow")},
        )
        prefect = Child(
            "Prefect",
            ["prefect", "server", "start", "--host=127.0.0.1", f"--port={self.ports['prefect']}"],
            self.address("prefect"),
            "/api/health",
            {"PREFECT_API_DATABASE_CONNECTION_URL": self.database("asyncpg", "prefect")},
        )
        return [s3, mlflow, prefect]

    @contextmanager
    def running(self, worker: bool = True) -> Iterator[Processes]:
        """All of it, deployed and healthy; ended with the context."""
        from prefect.settings import PREFECT_API_URL, temporary_settings

        from flows.deploy import deploy
        from flows.serve import worker as worker_of

        s3, *others = self.servers()
        with postgres(self.folder / "postgres", self.ports["postgres"], self.password), Processes(self.folder) as up:
            up.start(s3)
            up.wait_for(s3)
            made = subprocess.run(
                [sys.executable, "-m", "flows.stack", "buckets"], env=os.environ | self.client, check=False
            )
            if made.returncode:
                raise UserError("the buckets could not be made; see above.")
            for server in others:
                up.start(server)
            for server in others:
                up.wait_for(server)
            with temporary_settings({PREFECT_API_URL: self.client["PREFECT_API_URL"]}):
                for name in deploy():
                    print(f"deployed {name}", flush=True)
                if worker:
                    up.start(worker_of(self.client))
                yield up


# ---------------------------------------------------------------------------------------------------------------------
# PostgreSQL


@contextmanager
def postgres(folder: Path, port: int, password: str) -> Iterator[None]:
    """A PostgreSQL server in the folder, with a role `rlhf` and the databases. It refuses to run as root: then as
    another user."""
    tools = postgres_tools()
    user = postgres_user()
    folder.mkdir(parents=True)
    data, words = folder / "data", folder / "password"
    words.write_text(password, encoding="utf-8")
    words.chmod(0o600)
    if user:
        for path in (folder, words):
            shutil.chown(path, user)
        folder.parent.chmod(0o711)  # a temporary folder is its owner's alone, and the other user must pass

    def run(tool: str, *arguments: str, **environment: str) -> None:
        done = subprocess.run(
            [str(tools / tool), *arguments],
            cwd=folder,
            env={**os.environ, "LC_ALL": "C.UTF-8", **environment},
            user=user,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            raise UserError(f"PostgreSQL's {tool}: {(done.stderr or done.stdout).strip()[-1000:]}")

    run("initdb", "--pgdata", str(data), "--username=rlhf", f"--pwfile={words}", "--auth=scram-sha-256")
    words.unlink()
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c max_connections=200"
    run("pg_ctl", "start", "--wait", "--pgdata", str(data), "--log", str(folder / "log"), "--options", options)
    try:
        for name in DATABASES:
            run("createdb", "--host=127.0.0.1", f"--port={port}", "--username=rlhf", name, PGPASSWORD=password)
        yield
    finally:
        run("pg_ctl", "stop", "--wait", "--mode=fast", "--pgdata", str(data))


def postgres_tools() -> Path:
    """The folder of initdb and pg_ctl; as root it is installed where it is missing."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found and os.getuid() == 0 and shutil.which("apt-get"):
        print("installing Debian's postgresql ...", flush=True)
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "postgresql"]):
            subprocess.run(["apt-get", "-qq", *command], env=os.environ | quiet, check=False, stdout=subprocess.DEVNULL)
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if found:
        return found[-1].parent
    if tool := shutil.which("pg_ctl"):
        return Path(tool).resolve().parent
    raise UserError("PostgreSQL is not here. On Debian: `apt-get install postgresql`.")


def postgres_user() -> str | None:
    if os.getuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return "nobody"


# ---------------------------------------------------------------------------------------------------------------------


def local(watch_seconds: float) -> int:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.watch import Watcher

    with tempfile.TemporaryDirectory(prefix="rlhf-stack-") as folder:
        stack = Stack(Path(folder))
        print("starting; this takes a minute or two ...", flush=True)
        with stack.running() as up:
            settings = Path(folder) / "env"
            settings.touch(mode=0o600)
            settings.write_text(
                "".join(f"export {key}={value}\n" for key, value in (stack.client | QUIET).items()), encoding="utf-8"
            )
            for server in stack.servers():
                print(f"{server.name:<10} {server.address}")
            print(f"{'PostgreSQL':<10} 127.0.0.1:{stack.ports['postgres']}")
            print(
                f"In another shell: . {settings}    then `dvc remote add --local -d store s3://dvc/rlhf`, `make run`, "
                "`dvc push`; at the end `dvc remote remove --local store`"
            )
            print("Ctrl-C stops all of it and forgets what it holds.", flush=True)
            with temporary_settings({PREFECT_API_URL: stack.client["PREFECT_API_URL"]}):
                return up.wait(Watcher(Path()).look, watch_seconds)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.stack", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("local", help="the whole stack on loopback, without Docker, until Ctrl-C")
    command.add_argument("--watch-seconds", type=float, default=60, help="how often to look for new labels")
    commands.add_parser("buckets", help="make the S3 buckets that MLflow and DVC use")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if arguments.command == "local":
            return local(arguments.watch_seconds)
        buckets()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
