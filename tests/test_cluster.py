"""Ray: results as without it, whatever dies."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dvmsr_jax import cluster
from dvmsr_jax.commands import upscale
from dvmsr_jax.config import DataConfig, ModelConfig
from dvmsr_jax.errors import DiskFullError, UserError
from dvmsr_jax.model import DVMSR
from dvmsr_jax.pictures import jobs, spread
from dvmsr_jax.pictures.upscaler import PictureUpscaler, Upscaler
from dvmsr_jax.pretrained import save_safetensors

# One after the other: each cluster takes the machine's cores for its own.
pytestmark = pytest.mark.xdist_group("ray")

needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray")
ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


@pytest.fixture(scope="module")
def nodes():
    """A cluster of one machine with two cores, to which tests add others."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        # Its programs belong in the tests' cache, not in the user's.
        cache = jax.config.values["jax_compilation_cache_dir"]
        patch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        one = {"num_cpus": 2, "memory": 4096 * MIB, "object_store_memory": 100 * MIB}
        nodes = Cluster(initialize_head=True, head_node_args=one | {"include_dashboard": False})
        yield nodes
        nodes.shutdown()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    platforms = jax.config.values["jax_platforms"]
    yield tmp_path
    jax.config.update("jax_platforms", platforms)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of tiny random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4)
    save_safetensors(DVMSR(config, rngs=nnx.Rngs(0)), path)
    return path


def make(folder, count, size=(24, 20)):
    """Different pictures."""
    Path(folder).mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(Path(folder, f"{i}.png"))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["upscale.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        upscale.main()
    return stop.value.code


@needs_ray
def test_the_command(nodes, weights, monkeypatch, capsys):
    make("in", 30)
    make("in/sub", 3, size=(90, 80))
    Path("in/broken.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save("in/3.gif")
    assert run_main(monkeypatch, "in", "-o", "one", "--ckpt", weights, "--json", "one.json") == 1
    arguments = ["in", "--ckpt", weights, "-o", "two", "--json", "two.json"]
    capsys.readouterr()
    assert run_main(monkeypatch, *arguments, "--ray", nodes.address) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert "in/3.png -> two/3_png_x4.png" in printed.err
    assert "34 done, 0 skipped, 1 failed" in printed.err
    assert "failed: in/broken.png: is not a PNG" in printed.err
    assert contents("one/sub") == contents("two/sub")
    Path("one/sub").rename("sub1"), Path("two/sub").rename("sub2")
    assert contents("one") == contents("two")
    assert len(contents("two")) == 31
    Path("sub1").rename("one/sub"), Path("sub2").rename("two/sub")
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    for report in (one, two):
        report["pictures"] = {
            picture["source"]: (picture["status"], picture["what"].partition("/")[2])
            for picture in report["pictures"]
        }
    assert one.pop("megapixels") == pytest.approx(two.pop("megapixels"))
    assert one == two
    assert two["finished"]

    refused = run_main(monkeypatch, "in/7.png", "-o", "-", "--ckpt", weights, "--ray")
    assert refused == "error: --ray is for files: leave it out for standard input and output"


# A kind of remote place that processes share.
SHARED = """
import os
from fsspec.implementations.local import LocalFileSystem

class Shared(LocalFileSystem):
    protocol = "shared"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol("/" + path.removeprefix("shared:").lstrip("/"))
"""


@needs_ray
def test_remote_places(nodes, weights, monkeypatch, tmp_path):
    """With the summary there, too."""
    Path("package/shared-1.dist-info").mkdir(parents=True)
    Path("package/shared.py").write_text(SHARED)
    entry = "[fsspec.specs]\nshared = shared:Shared\n"
    Path("package/shared-1.dist-info/entry_points.txt").write_text(entry)
    Path("package/shared-1.dist-info/METADATA").write_text("Name: shared\nVersion: 1\n")
    monkeypatch.setenv("PYTHONPATH", str(Path("package").absolute()))
    monkeypatch.syspath_prepend("package")
    fsspec.register_implementation("shared", "shared.Shared")
    make("in", 3)
    there = f"shared:/{tmp_path}"  # as a bucket and a name
    summary = ["--json", f"{there}/summary.json"]
    remote = [f"{there}/in", "-o", f"{there}/remote/", *summary, "--ray", nodes.address]
    assert run_main(monkeypatch, *remote[:-2], "--ckpt", weights, *remote[-2:]) == 0
    assert run_main(monkeypatch, "in", "-o", "local", "--ckpt", weights) == 0
    assert contents("remote") == contents("local")
    report = json.loads(Path("summary.json").read_text())
    assert (report["done"], report["finished"]) == (3, True)
    assert report["pictures"][0]["what"].startswith(f"{there}/remote/")


@needs_ray
def test_workers_share_compiled_programs(weights, monkeypatch):
    make("in", 2)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    program = [sys.executable, ROOT / "upscale.py", "in", "-o", "out", "--ckpt", weights, "--ray"]
    subprocess.run(program, check=True, capture_output=True)
    assert list(Path("cache").glob("**/programs/jit_step-*"))  # which only workers compile


def test_the_largest_pictures_first(monkeypatch):
    """One by one; and small ones together."""
    make("in", 3)
    make("in/large", 3, size=(300, 200))
    Image.new("RGB", (3000, 2000)).save("in/flat.png")
    (found,) = [jobs.plan(["in"], "out/", scale=2.0, suffix=None)]
    batches = [[job.source.name for job in batch] for batch in spread._batches(found)]
    assert [len(batch) for batch in batches] == [1, 1, 1, 4]
    assert batches[-1][0] == "flat.png"  # 18 kB


@needs_ray
@pytest.mark.parametrize("overwrite", [False, True])
def test_inputs_are_not_overwritten(nodes, doubling, overwrite):
    make("in", 1)
    before = contents("in")
    planned = jobs.plan(["in/0.png"], "in/0.png", scale=2.0, suffix=None)
    (outcome,) = spread.run(
        planned,
        lambda: PictureUpscaler(doubling, 2),
        ray=(nodes.address,),
        keep=["in/0.png"],
        overwrite=overwrite,
    )
    assert outcome.what == "would overwrite in/0.png, an input"
    assert contents("in") == before


@pytest.fixture
def apart(nodes, folder, request):
    """A machine with two cores that has another folder in the place of `folder` or one in it."""
    other = folder / getattr(request, "param", ".")
    other.mkdir(exist_ok=True)
    command = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none "$0"; exec "$@"', other]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the permission to mount")
    process = start_machine(nodes, *command)
    try:
        with connected(nodes) as ray:
            while sum(node["Alive"] for node in ray.nodes()) < 2:
                assert process.poll() is None
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(60)
        with connected(nodes) as ray:
            while sum(node["Alive"] for node in ray.nodes()) > 1:
                time.sleep(0.2)


def start_machine(nodes, *command):
    """Starts a machine with two cores, by a command if there is one."""
    ray = [Path(sys.executable).parent / "ray", "start", "--block", "--address", nodes.address]
    sizes = ["--num-cpus=2", f"--memory={4096 * MIB}", f"--object-store-memory={100 * MIB}"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*command, *ray, *sizes], **silent, start_new_session=True)


@contextlib.contextmanager
def connected(nodes):
    import ray

    with warnings.catch_warnings(action="ignore"):
        ray.init(nodes.address, log_to_driver=False, logging_level="CRITICAL")
    yield ray
    ray.shutdown()


@pytest.fixture
def patient(folder, monkeypatch):
    """Items wait until a machine has been left out, but for a minute at most."""
    left_out = folder / "left-out"
    leave_out, spread_at_once = cluster._Pool._leave_out, cluster.spread

    def leave_out_and_tell(*arguments):
        leave_out(*arguments)
        left_out.touch()

    def spread_patiently(where, prepare, *arguments, **options):
        left_out.unlink(missing_ok=True)
        latest = time.time() + 60

        def prepare_patiently(stopped):
            answer = prepare(stopped)

            def wait_and_answer(*item):
                while not left_out.exists() and time.time() < latest:
                    time.sleep(0.1)
                return answer(*item)

            return wait_and_answer

        return spread_at_once(where, prepare_patiently, *arguments, **options)

    monkeypatch.setattr(cluster._Pool, "_leave_out", leave_out_and_tell)
    monkeypatch.setattr(cluster, "spread", spread_patiently)


def assert_left_out_once(printed):
    assert len(re.findall("is left out", printed)) == 1
    assert re.search(
        r"--ray: (\S+) is left out: \S+: \1 does not have the same folder there; name one that"
        " all machines share\n",
        printed,
    )


@needs_ray
def test_machines_that_do_not_share_the_results(
    nodes, apart, patient, doubling, monkeypatch, capsys
):
    """They are left out: nothing is lost there."""
    make("in", 20)
    monkeypatch.setattr(spread, "BATCH", 1)
    planned = jobs.plan(["in"], "out/", scale=2.0, suffix=None)
    outcomes = list(spread.run(planned, lambda: PictureUpscaler(doubling, 2), ray=(nodes.address,)))
    assert [one.status for one in outcomes] == ["done"] * 20
    assert len(contents("out")) == 20
    assert_left_out_once(capsys.readouterr().err)


@needs_ray
def test_preparing_and_distilling_on_machines_apart(
    nodes, apart, patient, weights, monkeypatch, capsys
):
    pytest.importorskip("tensorflow_datasets", reason="needs the packages for training")
    from dvmsr_jax.data import check
    from dvmsr_jax.data.prepare import prepare
    from dvmsr_jax.data.sources import find_sources
    from dvmsr_jax.training import targets

    monkeypatch.setattr("dvmsr_jax.data.prepare.PICTURES_PER_SHARD", 1)
    monkeypatch.setattr(targets, "PER_SHARD", 1)
    make("in", 20, size=(72, 80))
    sources = find_sources(DataConfig(hr_dirs=(Path("in"),), val_images=1))
    prepare(sources, 4, Path("out"), ray=(nodes.address,))
    assert_left_out_once(capsys.readouterr().err)
    targets.distill(weights, Path("out"), self_ensemble=False, batch_size=2, ray=(nodes.address,))
    assert_left_out_once(capsys.readouterr().err)
    assert check.find_problems(Path("out")) == targets.find_problems(Path("out")) == []
    assert not targets.find_unfinished(Path("out"))


@needs_ray
@pytest.mark.parametrize("apart", ["in"], indirect=True)
def test_preparing_on_machines_without_the_pictures(nodes, apart, patient, monkeypatch, capsys):
    pytest.importorskip("tensorflow_datasets", reason="needs the packages for training")
    from dvmsr_jax.data import check
    from dvmsr_jax.data.prepare import prepare
    from dvmsr_jax.data.sources import find_sources

    monkeypatch.setattr("dvmsr_jax.data.prepare.PICTURES_PER_SHARD", 1)
    make("in", 20, size=(72, 80))
    sources = find_sources(DataConfig(hr_dirs=(Path("in"),), val_images=1))
    prepare(sources, 4, Path("out"), ray=(nodes.address,))
    printed = capsys.readouterr().err
    assert len(re.findall("is left out", printed)) == 1
    assert re.search(
        r"--ray: (\S+) is left out: in/\d+\.png: \1 does not have this picture; name folders that "
        "all machines share\n",
        printed,
    )
    assert check.find_problems(Path("out")) == []


@needs_ray
def test_remote_pictures(nodes, doubling, web):
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    make("in", 3)
    planned = jobs.plan([f"{web}/in/"], "out/", scale=2.0, suffix=None)
    outcomes = list(spread.run(planned, lambda: PictureUpscaler(doubling, 2), ray=(nodes.address,)))
    assert [one.status for one in outcomes] == ["done"] * 3
    planned = jobs.plan(["in"], "one/", scale=2.0, suffix=None)
    for _ in jobs.run(planned, PictureUpscaler(doubling, 2)):
        pass
    assert contents("out") == contents("one")


@needs_ray
def test_a_machine_that_dies(nodes, weights):
    """In the middle of 200 pictures: all there, none twice, none half."""
    make("in", 200)
    for _ in jobs.run(jobs.plan(["in"], "one/", scale=4.0, suffix=None), Upscaler(weights)):
        pass
    with warnings.catch_warnings(action="ignore"):
        second = nodes.add_node(num_cpus=1, object_store_memory=100 * MIB)
    planned = jobs.plan(["in"], "two/", scale=4.0, suffix=None)

    def slow():
        """So that many pictures are left when the machine dies."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        upscaler = Upscaler(weights)
        upscale = upscaler._upscale

        def slowly(image):
            Path(here).touch()
            time.sleep(0.05)
            return upscale(image)

        upscaler._upscale = slowly
        return upscaler

    outcomes = []
    before = None
    for outcome in spread.run(planned, slow, ray=(nodes.address,)):
        outcomes.append(outcome)
        if before is None and len(outcomes) >= 60 and Path(second.node_id).exists():
            before = len(os.listdir("two"))
            nodes.remove_node(second, allow_graceful=False)
    assert before < 200
    assert sorted(str(one.source) for one in outcomes) == sorted(str(job.source) for job in planned)
    # Those that the machine finished without reporting it are found again.
    assert {one.status for one in outcomes} <= {"done", "skipped"}
    results = contents("two")
    half = {name for name in results if name.startswith(".dvmsr-")}
    assert len(half) <= 1  # of a worker that was killed while it wrote
    assert {name: results[name] for name in results.keys() - half} == contents("one")


@needs_ray
def test_an_idle_worker_of_a_machine_that_dies(nodes):
    """It is not given, and does not lose again, what the machine has just lost."""
    with warnings.catch_warnings(action="ignore"):
        second = nodes.add_node(num_cpus=2, object_store_memory=100 * MIB)
    dying, folder = second.node_id, Path().absolute()

    def prepare(stopped):
        import ray

        here = ray.get_runtime_context().get_node_id()
        Path(folder, f"ready-{os.getpid()}").touch()

        def wait_for(count, pattern):
            while len(list(folder.glob(pattern))) < count:
                time.sleep(0.05)

        def answer(item, memory):
            if here != dying:  # busy until the death is noticed
                wait_for(1, "killed")
                time.sleep(5)
                return here
            try:
                Path(folder, "first").touch(exist_ok=False)
            except FileExistsError:
                Path(folder, "victim").touch()
                wait_for(1, "never")
            wait_for(4, "ready-*")
            time.sleep(1)
            return here

        return answer

    answers = {}
    for item, answer in cluster.spread((nodes.address,), prepare, [[item] for item in "abcd"]):
        if not answers:
            assert answer == dying
            while not Path("victim").exists():
                time.sleep(0.05)
            # The other worker there is idle.
            nodes.remove_node(second, allow_graceful=False)
            Path("killed").touch()
        answers[item] = answer
    assert sorted(answers) == list("abcd")
    assert not [answer for answer in answers.values() if isinstance(answer, cluster.Lost)]


@needs_ray
def test_deaths_of_machines_do_not_count(nodes):
    """Two machines die with the same items in hand."""
    folder = Path().absolute()
    head = nodes.head_node.node_id

    def prepare(stopped):
        import ray

        here = ray.get_runtime_context().get_node_id()

        def answer(item, memory):
            Path(folder, f"{here}-{item}").touch()
            while here != head or not Path(folder, "released").exists():
                time.sleep(0.05)
            return here

        return answer

    def kill_machines():
        for begun in (4, 6):
            machine = start_machine(nodes)
            while len(list(folder.iterdir())) < begun and machine.poll() is None:
                time.sleep(0.05)
            os.killpg(machine.pid, signal.SIGKILL)
            machine.wait()
        Path(folder, "released").touch()

    thread = threading.Thread(target=kill_machines)
    thread.start()
    answers = dict(cluster.spread((nodes.address,), prepare, [[item] for item in "abcd"]))
    thread.join()
    assert answers == dict.fromkeys("abcd", head)
    assert len(list(folder.iterdir())) == 2 + 2 + 2 + 2 + 1  # here, there, there, here


@needs_ray
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refuses", "no such file"),
        ("dies", "--ray: 3 workers ended while they started: "),
        ("is full", "/tmp: No space left on device"),
    ],
)
def test_a_machine_that_cannot_be_used(nodes, capfd, fault, reason):
    """Others do its work. Its workers are not started again and again."""
    with warnings.catch_warnings(action="ignore"):
        bad = nodes.add_node(num_cpus=2, object_store_memory=100 * MIB)
    folder, name = Path().absolute(), bad.node_id

    def prepare(stopped):
        import ray

        here = ray.get_runtime_context().get_node_id()
        if here == name:
            Path(folder, f"{os.getpid()}.started").touch()
        if here == name and fault == "refuses":
            raise UserError("no such file")
        if here == name and fault == "dies":
            os._exit(1)

        def answer(item, memory):
            if here == name:
                raise DiskFullError("/tmp: No space left on device")
            time.sleep(1)
            return here

        return answer

    answers = dict(cluster.spread((nodes.address,), prepare, [[i] for i in range(30)]))
    nodes.remove_node(bad)
    assert answers == dict.fromkeys(range(30), nodes.head_node.node_id)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert f" is left out: {reason}" in line
    assert len(list(folder.glob("*.started"))) <= 4


@needs_ray
def test_a_picture_that_kills_its_worker(nodes, doubling):
    """Whatever is in the same batch is done by others."""
    make("in", 5)
    Image.new("RGB", (13, 13)).save("in/deadly.png")

    def deadly():
        def upscale(image):
            if image.shape == (13, 13, 3):
                os.kill(os.getpid(), signal.SIGKILL)
            return doubling(image)

        return PictureUpscaler(upscale, 2)

    planned = jobs.plan(["in"], "out/", scale=2.0, suffix=None)
    outcomes = {one.source.name: one for one in spread.run(planned, deadly, ray=(nodes.address,))}
    assert len(outcomes) == 6
    killed = outcomes.pop("deadly.png")
    assert killed.status == "failed"
    assert killed.what == "its process was killed 2 times, perhaps for lack of memory"
    assert {one.status for one in outcomes.values()} <= {"done", "skipped"}
    results = {name for name in os.listdir("out") if not name.startswith(".dvmsr-")}
    assert results == {f"{i}_x2.png" for i in range(5)}


@needs_ray
def test_large_items_wait_for_memory(nodes):
    """Two cores share 4 GiB, of which idle workers take 1.4: about 1.3 for each worker's items."""
    log = Path("log").absolute()

    def prepare(stopped):
        def answer(item, memory):
            if item > memory:
                raise cluster.TooLargeError(item)
            with log.open("a") as file:
                file.write(f"start {item}\n")
            time.sleep(1)
            with log.open("a") as file:
                file.write(f"end {item}\n")
            return item

        return answer

    large = [2000 * MIB, 2001 * MIB, 9000 * MIB]
    items = [*large, *(i * MIB for i in range(100, 110))]
    answers = dict(cluster.spread((nodes.address,), prepare, [[item] for item in items]))
    assert answers == {item: item for item in items}
    in_hand, most, begun = set(), 0, []
    for line in log.read_text().splitlines():
        what, size = line.split()
        if what == "start":
            begun.append(int(size))
        (in_hand.add if what == "start" else in_hand.remove)(int(size))
        most = max(most, len(in_hand))
        if len(in_hand) > 1:
            assert max(in_hand) < 1400 * MIB or sum(in_hand) < 2700 * MIB
    assert most == 2
    # They do not wait until nothing else is left.
    assert max(begun.index(size) for size in large) < len(items) - 4


@needs_ray
def test_no_more_workers_than_memory(nodes):
    with warnings.catch_warnings(action="ignore"):
        small = nodes.add_node(num_cpus=6, memory=2500 * MIB, object_store_memory=100 * MIB)

    def prepare(stopped):
        import ray

        here = ray.get_runtime_context().get_node_id()

        def answer(item, memory):
            time.sleep(1)
            return here, os.getpid(), memory

        return answer

    answers = [answer for _, answer in cluster.spread((nodes.address,), prepare, [[0]] * 16)]
    nodes.remove_node(small)
    assert len(answers) == 16
    there = {(pid, memory) for here, pid, memory in answers if here == small.node_id}
    assert len(there) == 2
    assert {memory for _, memory in there} == {550 * MIB}


@needs_ray
def test_workers_that_cannot_start(nodes):
    def refusing(stopped):
        raise UserError("weights.pth: no such file")

    def dying(stopped):
        os._exit(1)

    with pytest.raises(UserError, match=r"^weights\.pth: no such file$"):
        list(cluster.spread((nodes.address,), refusing, [["a"]]))
    with pytest.raises(UserError, match=r"--ray: 3 workers ended while they started: .* died"):
        list(cluster.spread((nodes.address,), dying, [["a"]]))
    with pytest.raises(UserError, match="--device tpu: --ray uses CPUs"):
        list(cluster.spread((nodes.address,), refusing, [["a"]], device="tpu"))


@needs_ray
def test_no_cluster_at_the_address(weights, monkeypatch):
    make("in", 1)
    message = run_main(monkeypatch, "in", "-o", "out", "--ckpt", weights, "--ray", "nowhere:x")
    assert message.startswith("error: --ray nowhere:x: ")
    assert "\n" not in message


@needs_ray
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="needs a machine without GPU")
def test_no_gpu_on_this_machine(weights):
    make("in", 1)
    command = [sys.executable, ROOT / "upscale.py", "in", "--ckpt", weights, "--device", "gpu"]
    result = subprocess.run([*command, "--ray"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr == "error: --device gpu: Ray finds none on this machine\n"


@needs_ray
def test_the_cluster_ends(nodes, weights, monkeypatch):
    """While a worker runs: what it did is reported."""
    make("in", 3)

    def ending(*arguments, **options):
        for one in spread_(*arguments, **options):
            yield one
            raise UserError("--ray: the cluster fails")

    spread_ = cluster.spread
    monkeypatch.setattr(cluster, "spread", ending)
    monkeypatch.setattr(spread, "BATCH", 1)
    arguments = ["in", "-o", "out", "--ckpt", weights, "--json", "report.json"]
    assert run_main(monkeypatch, *arguments, "--ray", nodes.address) == 1
    report = json.loads(Path("report.json").read_text())
    assert (report["finished"], report["done"]) == (False, 1)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("in/0.png", "is the name of a picture; choose another"), ("in", "Is a directory")],
)
def test_a_summary_that_cannot_be_written(weights, monkeypatch, path, reason):
    """Is found before the work."""
    make("in", 1)
    before = contents("in")
    message = run_main(monkeypatch, "in", "-o", "out/", "--ckpt", weights, "--json", path)
    assert message.startswith("error: ")
    assert reason in message
    assert contents("in") == before
    assert not Path("out").exists()


def test_without_ray(weights, monkeypatch):
    make("in", 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = run_main(monkeypatch, "in", "-o", "out", "--ckpt", weights, "--ray")
    assert message == 'error: --ray needs Ray: pip install "dvmsr-jax[ray]"'


@needs_ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_is_stopped(nodes, weights, monkeypatch, number):
    """With SIGINT on a Ray of its own. Afterwards, the same command goes on."""
    make("in", 4)
    make("in/large", 4, size=(900, 700))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.values["jax_compilation_cache_dir"])
    command = [sys.executable, ROOT / "upscale.py", "in", "-o", "out", "--ckpt", weights]
    command += ["--json", "report.json", "--ray"]
    if number != signal.SIGINT:
        command.append(nodes.address)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while process.poll() is None and not list(Path("out/large").glob(".dvmsr-*")):
            time.sleep(0.05)
        if number == signal.SIGINT:  # as a terminal does
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, printed = process.communicate(timeout=120)
    finally:
        process.kill()
    if number == signal.SIGKILL:
        assert process.returncode == -number, printed
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        found = {path.relative_to("out") for path in Path("out").glob("**/*_x4.png")}
        assert len(found) == 8
        undisturbed = ["in", "-o", "undisturbed", "--ckpt", weights]
        assert run_main(monkeypatch, *undisturbed) == 0
        for path in found:
            assert Path("out", path).read_bytes() == Path("undisturbed", path).read_bytes()
        return
    assert process.returncode == 128 + number, printed
    assert not list(Path("out").glob("**/.dvmsr-*"))
    lines = [line for line in printed.splitlines() if "->" not in line]
    assert lines[0] == "interrupted; run the same command again to resume"
    assert lines[1].endswith(" done, 0 skipped, 0 failed")
    assert len(lines) == 2
    report = json.loads(Path("report.json").read_text())
    assert not report["finished"]
    assert report["failed"] == 0


@needs_ray
def test_preparing_and_distilling(nodes, weights, monkeypatch):
    """The same bytes as without, although one file is there already, and workers die."""
    pytest.importorskip("tensorflow_datasets", reason="needs the packages for training")
    from dvmsr_jax.data import check, prepare
    from dvmsr_jax.data.sources import find_sources
    from dvmsr_jax.training import targets

    def spread_and_kill(where, prepare, batches, **options):
        """The first worker that begins dies."""
        mark = Path(f"killed-{len(marks)}").absolute()
        marks.append(mark)

        def prepare_worker(stopped):
            answer = prepare(stopped)

            def kill_or_answer(item, memory):
                with contextlib.suppress(FileExistsError):
                    mark.touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
                return answer(item, memory)

            return kill_or_answer

        return spread_(where, prepare_worker, batches, **options)

    marks, spread_ = [], cluster.spread
    monkeypatch.setattr(cluster, "spread", spread_and_kill)
    monkeypatch.setattr(prepare, "PICTURES_PER_SHARD", 1)
    monkeypatch.setattr(targets, "PER_SHARD", 1)
    make("in", 5, size=(72, 80))
    Path("in/unreadable.png").write_text("no picture")
    sources = find_sources(DataConfig(hr_dirs=(Path("in"),), val_images=1))
    for name, where in (("one", None), ("two", (nodes.address,))):
        prepare.prepare(sources, 4, Path(name), max_unreadable=0.5, ray=where)
    options = {"self_ensemble": False, "batch_size": 2}
    path = targets.distill(weights, Path("one"), **options)
    there = Path("two") / path.relative_to("one")
    there.mkdir(parents=True)
    for file in (path / "00002.npy", path / targets.INFO):
        shutil.copy(file, there)
    targets.distill(weights, Path("two"), **options, ray=(nodes.address,))

    def contents_below(folder):
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    assert len(list(there.glob("*.npy"))) == 4
    assert contents_below("two") == contents_below("one")
    assert check.find_problems(Path("two")) == targets.find_problems(Path("two")) == []
    assert [mark.exists() for mark in marks] == [True, True]


@needs_ray
@pytest.mark.parametrize(
    ("number", "on_ray"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGKILL, True)],
)
def test_preparing_is_stopped(nodes, number, on_ray):
    """The same command resumes it, and the bytes are those of an undisturbed run."""
    pytest.importorskip("tensorflow_datasets", reason="needs the packages for training")
    make("in", 100, size=(400, 400))
    program = [sys.executable, "-m", "dvmsr_jax", "data", "prepare", "--hr-dirs", "in"]
    program += ["--val-images", "1", "--out"]
    here = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}
    command = [*program, "out", *(["--ray", nodes.address] if on_ray else [])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, **here)
    try:
        while process.poll() is None and not list(Path().glob("**/*.json")):
            time.sleep(0.02)
        process.send_signal(number)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
    assert not Path("out").exists()
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number, printed
        assert printed.splitlines()[-1] == "stopped; the same command resumes"
        assert not Path(".dvmsr").exists()
    done = {path: path.stat().st_mtime_ns for path in Path().glob("**/*.json")}
    assert done
    subprocess.run(command, check=True, capture_output=True, **here)
    subprocess.run([*program, "undisturbed"], check=True, capture_output=True, **here)
    assert contents("out") == contents("undisturbed")
