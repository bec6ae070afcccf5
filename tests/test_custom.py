"""Foreign detectors: real files written by onnx, TorchScript and torch.export, and what goes wrong with them."""
import platform
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
import yaml
from forks import python
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from imaginet_nb.apps.evaluate import judge
from imaginet_nb.apps.predict import Scorer, Settings, score_files
from imaginet_nb.data.folders import CustomDataset, read_custom_dataset
from imaginet_nb.data.images import save
from imaginet_nb.data.labels import FAMILIES
from imaginet_nb.detectors.custom import DetectorError, FileDetector, load_custom_detector, read_settings, weights_sha256
from imaginet_nb.detectors.predictions import predict
from imaginet_nb.evaluation.bootstrap import unscored_note

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
KEYS = dict(name="Somebody", input_size=16, range=[0, 1], mean=list(MEAN), std=list(STD), output="logit")


class Net(nn.Module):
    "Convolution, mean, linear layer: scores of `outputs` columns, and, if asked, four family logits."
    def __init__(self, outputs: int = 1, families: bool = False):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, outputs)
        self.families = nn.Linear(5, 4) if families else None

    def forward(self, x: torch.Tensor):
        features = self.conv(x).relu().mean((2, 3))
        return self.head(features) if self.families is None else (self.head(features), self.families(features))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8))


def feed(images: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    "What KEYS say, written out channel by channel."
    planes = [(images[:, c].double()/255*(high - low) + low - MEAN[c])/STD[c] for c in range(3)]
    return torch.stack(planes, 1).float()


def write_yaml(path: Path, **changes) -> Path:
    keys = {k: v for k, v in {**KEYS, **changes}.items() if v != "drop"}
    path.with_suffix(".yaml").write_text(yaml.safe_dump(keys))
    return path


def write_onnx(path: Path, net: Net, shape=("B", 3, "H", "W"), kind=TensorProto.FLOAT, scale=1.0, sigmoid=False) -> Path:
    "The same network as a graph, node by node, from the numbers alone."
    heads = [("score", net.head)] + ([("family", net.families)] if net.families is not None else [])
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    def constant(name, tensor): return numpy_helper.from_array((tensor.detach().numpy()).astype(dtype), name)
    nodes = [helper.make_node("Conv", ["x", "conv.w", "conv.b"], ["c"]), helper.make_node("Relu", ["c"], ["r"]),
             helper.make_node("GlobalAveragePool", ["r"], ["p"]), helper.make_node("Flatten", ["p"], ["f"])]
    tensors = [constant("conv.w", net.conv.weight), constant("conv.b", net.conv.bias)]
    for name, layer in heads:
        out = f"{name}.raw" if sigmoid and name == "score" else name
        nodes.append(helper.make_node("Gemm", ["f", f"{name}.w", f"{name}.b"], [out], transB=1))
        if out != name: nodes.append(helper.make_node("Sigmoid", [out], [name]))
        tensors += [constant(f"{name}.w", layer.weight*scale), constant(f"{name}.b", layer.bias*scale)]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, _ in heads]
    graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info("x", kind, shape)], outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_script(path: Path, net: nn.Module, how: str) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "export":
            dynamic = {"x": {0: torch.export.Dim("B")}}
            torch.export.save(torch.export.export(net, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=dynamic), path)
        else: (torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.zeros(1, 3, 16, 16))).save(path)
    return path


# the same numbers as the network itself

@pytest.mark.parametrize("file, how", [("net.pt", "script"), ("NET.PT", "script"), ("net.ts", "trace"), ("net.pt2", "export")])
def test_programs_score_as_the_network_does(net, images, tmp_path, file, how):
    detector = load_custom_detector(str(write_yaml(write_script(tmp_path/file, net, how))), trust=True)
    with torch.no_grad(): torch.testing.assert_close(detector.score(images), net(feed(images))[:, 0], atol=1e-5, rtol=0)
    assert (detector.name, detector.input_size, detector.tracks) == ("Somebody", 16, ("detection",))


@pytest.mark.parametrize("file, shape", [("net.onnx", ("B", 3, "H", "W")), ("net.onnx", ("B", 3, 16, 16)), ("net.onnx", (1, 3, 16, 16)),
                                         ("NET.ONNX", (None, None, None, None))])
def test_graphs_score_as_the_network_does(net, images, tmp_path, file, shape):
    detector = load_custom_detector(str(write_yaml(write_onnx(tmp_path/file, net, shape))))
    with torch.no_grad(): torch.testing.assert_close(detector.score(images), net(feed(images))[:, 0], atol=1e-5, rtol=0)


def test_another_range_of_pixels(net, images, tmp_path):
    score = load_custom_detector(str(write_yaml(write_onnx(tmp_path/"net.onnx", net), range=[-1, 1]))).score(images)
    with torch.no_grad(): torch.testing.assert_close(score, net(feed(images, -1, 1))[:, 0], atol=1e-5, rtol=0)


def test_a_graph_in_half_precision(net, images, tmp_path):
    score = load_custom_detector(str(write_yaml(write_onnx(tmp_path/"net.onnx", net, kind=TensorProto.FLOAT16)))).score(images)
    assert score.dtype == torch.float32
    with torch.no_grad(): torch.testing.assert_close(score, net(feed(images))[:, 0], atol=5e-3, rtol=0)


@pytest.mark.parametrize("synthetic", [0, 1])
def test_two_logits_and_families_in_another_order(images, tmp_path, synthetic):
    torch.manual_seed(1)
    net, order = Net(2, families=True), ["DALL-E 3", "GAN", "SD", "Midjourney"]
    write_yaml(write_onnx(tmp_path/"net.onnx", net), output="two_logits", synthetic=synthetic, identification=order)
    detector = load_custom_detector(str(tmp_path/"net.onnx"))
    with torch.no_grad(): scores, families = net(feed(images))
    chance = scores.softmax(1)[:, synthetic]
    torch.testing.assert_close(detector.score(images).sigmoid(), chance, atol=1e-5, rtol=0)
    ours = detector.identify(images)
    for k, family in enumerate(FAMILIES): torch.testing.assert_close(ours[:, k], families[:, order.index(family)], atol=1e-5, rtol=0)


def test_probabilities_become_logits(net, images, tmp_path):
    write_yaml(write_onnx(tmp_path/"net.onnx", net, sigmoid=True), output="probability")
    with torch.no_grad(): expected = net(feed(images))[:, 0]
    torch.testing.assert_close(load_custom_detector(str(tmp_path/"net.onnx")).score(images), expected, atol=1e-4, rtol=0)


def test_bgr_sees_the_channels_turned_round_with_their_own_mean(net, images, tmp_path):
    write_yaml(write_onnx(tmp_path/"net.onnx", net), channels="BGR")
    with torch.no_grad(): expected = net(feed(images).flip(1))[:, 0]
    torch.testing.assert_close(load_custom_detector(str(tmp_path/"net.onnx")).score(images), expected, atol=1e-5, rtol=0)


def test_other_sizes_are_cropped_and_rows_do_not_depend_on_neighbours(net, tmp_path):
    "Through `predict`, with files of three sizes: the middle of the large, the small one mirrored."
    generator, rows = np.random.default_rng(0), []
    for i, shape in enumerate([(16, 16), (31, 20), (10, 16)]):
        save(generator.integers(0, 256, (*shape, 3), dtype=np.uint8), tmp_path/f"{i}.png")
        rows.append(dict(path=f"{i}.png", origin="real", content_type="photos", generator_family="real", generator="real", split="test"))
    detector = load_custom_detector(str(write_yaml(write_onnx(tmp_path/"net.onnx", net))))
    together = predict(detector, pd.DataFrame(rows), tmp_path, num_workers=0)
    alone = pd.concat([predict(detector, pd.DataFrame([row]), tmp_path, num_workers=0) for row in rows], ignore_index=True)
    np.testing.assert_allclose(together["logit"], alone["logit"], atol=1e-6)
    large = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 31, 20), dtype=np.uint8))
    torch.testing.assert_close(detector.score(large), detector.score(large[:, :, 7:23, 2:18]))


# what is refused, with file and key

def refuse(spec, *words, **options):
    with pytest.raises(DetectorError) as caught: load_custom_detector(str(spec), **options)
    for word in (Path(spec).stem, *words): assert word in str(caught.value), f"{word!r} not in: {caught.value}"


@pytest.mark.parametrize("changes, words", [
    (dict(mean="drop"), ["net.yaml", "mean: missing key"]),
    (dict(menu=[1]), ["net.yaml", "menu: unknown key; did you mean 'mean'?"]),
    (dict(xyzzy=1), ["net.yaml", "xyzzy: unknown key; known: name"]),
    (dict(std=[0, 1, 1]), ["net.yaml", "std.0", "greater than 0"]),
    (dict(mean=[0.5]), ["net.yaml", "mean", "at least 3"]),
    (dict(input_size="16"), ["net.yaml", "input_size"]),
    (dict(input_size=0), ["net.yaml", "input_size"]),
    (dict(output="score"), ["net.yaml", "output", "probability"]),
    (dict(output="two_logits"), ["net.yaml", "synthetic: needed"]),
    (dict(synthetic=1), ["net.yaml", "synthetic: needed with output: two_logits"]),
    (dict(output="two_logits", synthetic=1), ["net.onnx", "output: two_logits", "(B, 2)", "(2, 1)"]),
    (dict(output="probability"), ["net.onnx", "output: probability", "is it a logit?"]),
    (dict(identification=["GAN", "SD"]), ["net.yaml", "identification", "Midjourney"]),
    (dict(identification=list(FAMILIES)), ["net.onnx", "only one output", "identification"]),
    (dict(mean=[float("nan"), 0, 0]), ["net.yaml", "mean.0", "finite number"])])
def test_wrong_keys(net, tmp_path, changes, words):
    refuse(write_yaml(write_onnx(tmp_path/"net.onnx", net, scale=1e3), **changes), *words)


@pytest.mark.parametrize("shape, changes, words", [
    (("B", 3, 24, 24), {}, ["net.yaml", "input_size: 16", "24 pixels only"]),
    (("B", 3, 16, 24), {}, ["net.yaml", "input_size: 16", "24 pixels only"]),
    (("B", 3, 24, 24), dict(input_size=None), ["input_size: null"]),
    (("B", 16, 16, 3), {}, ["net.onnx", "shape (B, 3, H, W)"]),
    ((4, 3, 16, 16), {}, ["net.onnx", "batches of 4"]),
    (("B", 3), {}, ["net.onnx", "onnxruntime|shape (B, 3, H, W)"])])
def test_graphs_of_the_wrong_shape(net, tmp_path, shape, changes, words):
    path = write_yaml(write_onnx(tmp_path/"net.onnx", net, shape), **changes)
    with pytest.raises(DetectorError) as caught: load_custom_detector(str(path))
    for word in words: assert any(w in str(caught.value) for w in word.split("|")), caught.value


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors divide without a signal")
@pytest.mark.parametrize("when", ["load", "run"])
def test_a_graph_that_crashes_the_runtime_is_refused(tmp_path, when):
    """The smallest 64-bit integer by -1: constants are divided while the file is loaded, an input when the first image is scored.

    Here, in this process, a loader without a trial would end the tests; so it is asked for in a process of its own.
    """
    nodes = [helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=0)]
    nodes.append(helper.make_node("Cast", ["mean" if when == "run" else "zero"], ["whole"], to=TensorProto.INT64))
    nodes += [helper.make_node("Mul", ["whole", "nought"], ["none"]), helper.make_node("Add", ["none", "least"], ["number"]),
              helper.make_node("Div", ["number", "minus"], ["result"]),
              helper.make_node("Cast", ["result"], ["small"], to=TensorProto.FLOAT),
              helper.make_node("Add", ["mean", "small"], ["y"])]
    integers = {"nought": 0, "least": np.iinfo(np.int64).min, "minus": -1}
    constants = [numpy_helper.from_array(np.array([number], np.int64), name) for name, number in integers.items()]
    constants.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", ("B", 3, "H", "W")), ("y", None)))
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, write_yaml(tmp_path/"crash.onnx"))
    code = f"from {load_custom_detector.__module__} import load_custom_detector; load_custom_detector('crash.onnx')"
    done = python(code, cwd=tmp_path)
    assert done.returncode == 1 and "DetectorError: crash.onnx: ONNX Runtime crashes (SIGFPE)" in done.stderr, done


def test_a_graph_of_integers_and_scores_that_are_no_numbers(net, tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, ("B", 3, 16, 16))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    cast = helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)], "g", [x], [y])
    onnx.save(helper.make_model(cast, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path/"bytes.onnx")
    refuse(write_yaml(tmp_path/"bytes.onnx"), "one input of floats", "uint8")
    refuse(write_yaml(write_onnx(tmp_path/"nan.onnx", net, scale=float("nan"))), "score", "not finite")


def test_files_that_are_not_what_they_are_called(net, tmp_path):
    refuse(tmp_path/"none.onnx", "no such file")
    refuse(write_onnx(tmp_path/"alone.onnx", net), "alone.yaml", "no such file", "input_size")
    for name in ("text.onnx", "text.pt", "text.pt2"):
        write_yaml(tmp_path/name).write_bytes(b"not a network")
        refuse(tmp_path/name, name, trust=True)
    torch.save(net.state_dict(), write_yaml(tmp_path/"weights.pt"))
    refuse(tmp_path/"weights.pt", "a file of weights alone", trust=True)
    (tmp_path/"alone.yaml").write_text("name: [unclosed")
    refuse(tmp_path/"alone.onnx", "alone.yaml", "not valid YAML")
    (tmp_path/"alone.yaml").write_text("")
    refuse(tmp_path/"alone.onnx", "alone.yaml", "expected the keys name")


def test_code_in_files_is_not_run_without_trust(net, tmp_path, monkeypatch):
    def never(*_, **__): raise AssertionError("loaded")
    monkeypatch.setattr(torch.jit, "load", never)
    monkeypatch.setattr(torch.export, "load", never)
    for name in ("net.pt", "net.ts", "net.pt2"):
        write_yaml(tmp_path/name).write_bytes(b"anything")
        refuse(tmp_path/name, "trust=True", "code of their own")


# module:Class

MODULE = """
import torch
class Good:
    name, input_size = "Good", None
    def score(self, images): return images.float().mean((1, 2, 3)) - 100
class Where(Good):
    def __init__(self, device): self.where = device
class Network(torch.nn.Module):
    name, input_size = "Network", 8
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(192, 1)
    def score(self, images): return self.layer(images.flatten(1).float())[:, 0].detach()
ready, make = Good(), lambda: Good()
class Silent: name, input_size = "Silent", None
class Needy(Good):
    def __init__(self, path): pass
class Column(Good):
    def score(self, images): return super().score(images)[:, None]
class Whole(Good):
    def score(self, images): return super().score(images).long()
class Listed(Good):
    def score(self, images): return super().score(images).tolist()
class Nan(Good):
    def score(self, images): return super().score(images)*float("nan")
class Raises(Good):
    def score(self, images): raise KeyError("weights")
class Nameless(Good): name = None
class Sized(Good): input_size = "224"
class Families(Good):
    tracks = ("detection", "identification")
    def identify(self, images): return torch.zeros(len(images), 3)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working folder with a module of a name that is used once, and the path of imports as it was afterwards."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    name = f"foreign_{abs(hash(str(tmp_path)))}"
    (tmp_path/f"{name}.py").write_text(MODULE)
    (tmp_path/"broken.py").write_text("import nowhere_to_be_found")
    return name


@pytest.mark.parametrize("name", ["Good", "ready", "make", "Where"])
def test_classes_functions_and_detectors(here, name):
    detector = load_custom_detector(f"{here}:{name}")
    images = torch.full((2, 3, 4, 4), 130, dtype=torch.uint8)
    assert detector.score(images).tolist() == [30, 30] and detector.name == "Good"
    if name == "Where": assert detector.where == "cpu"


def test_networks_come_in_evaluation_mode(here):
    assert not load_custom_detector(f"{here}:Network").training


@pytest.mark.parametrize("name, words", [
    ("Silent", ["Silent has no score"]), ("Needy", ["making the detector failed", "path"]), ("Column", ["(2,)", "(2, 1)"]),
    ("Whole", ["float tensor", "int64"]), ("Listed", ["float tensor", "list"]), ("Nan", ["not finite", "nan"]),
    ("Raises", ["score failed on 2 images", "KeyError", "weights"]),
    ("Nameless", ["name: must be a text"]), ("Sized", ["input_size", "'224'"]),
    ("Families", ["identify", "(2, 4)", "(2, 3)"]), ("Goud", ["has no Goud", "did you mean Good?"]), ("Xyzzy", ["has no Xyzzy"])])
def test_classes_that_break_the_protocol(here, name, words):
    refuse(f"{here}:{name}", *words)


def test_modules_that_are_not_there(here):
    refuse("no_such_module:Class", "no module no_such_module")
    refuse(f"{here}.deeper:Class", "no module")
    refuse("broken:Class", "importing broken failed", "nowhere_to_be_found")
    refuse("justaname", "not module:Class")


def test_every_fault_is_a_value_error_that_the_command_line_prints_in_one_line(here):
    assert issubclass(DetectorError, ValueError)
    with pytest.raises(DetectorError) as caught: load_custom_detector(f"{here}:Raises")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body, words", [
    ("raise SystemExit(2)", "importing odd_module failed: SystemExit: 2"),
    ("class D:\n    def __init__(self): raise SystemExit(2)", "making the detector failed: SystemExit: 2"),
    ("class D:\n    name, input_size = 'D', 16\n    def score(self, images): raise SystemExit(2)", "16 pixels: SystemExit: 2"),
    ("class D:\n    name, input_size, score = 'D', 10**7, None", "input_size: 1 to 16384 pixels or None, got 10000000"),
    ("class D:\n    name, input_size, score = 'D', True, None", "input_size: 1 to 16384 pixels or None, got True"),
    ("class D:\n    name, input_size, score = 'a\\ud800', 16, None", "name: must be a text on one line"),
    ("class D:\n    name = property(lambda self: 1/0)", "reading the attributes of D failed: ZeroDivisionError")])
def test_modules_that_end_the_program_or_ask_for_the_impossible_are_refused(tmp_path, monkeypatch, body, words):
    (tmp_path/"odd_module.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_module", raising=False)
    with pytest.raises(DetectorError) as caught: load_custom_detector("odd_module:D")
    assert words in str(caught.value)


def test_an_input_size_beyond_all_memory_is_refused(tmp_path):
    beside = write_yaml(tmp_path/"net.onnx", input_size=10**7).with_suffix(".yaml")
    with pytest.raises(DetectorError, match="input_size: .*16384"): read_settings(beside)


def test_weights_count_in_whatever_a_detector_keeps_them(tmp_path, monkeypatch):
    "Arrays and settings from files that only the detector knows: another file is another detector."
    (tmp_path/"keeper.py").write_text("import json, numpy, torch\n" + "\n".join(
        f"class {name}:\n    name, input_size = '{name}', 16\n    def __init__(self): self.held = {held}\n"
        "    def score(self, images): return images.float().mean((1, 2, 3))" for name, held in (
            ("Array", "numpy.load('w.npy')"), ("Deep", "{'a': [torch.nn.ParameterList([torch.from_numpy(numpy.load('w.npy'))])]}"),
            ("Text", "json.load(open('w.json'))"))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = {}
    for value in (1.0, 1.0, 2.0):
        np.save("w.npy", np.full(3, value, np.float32))
        Path("w.json").write_text(f'{{"factor": {value}}}')
        for name in ("Array", "Deep", "Text"): found.setdefault(name, []).append(weights_sha256(load_custom_detector(f"keeper:{name}")))
    assert all(first == second != third for first, second, third in found.values())


# what a detector is shown of a picture

def squares(tmp_path: Path, **keys) -> tuple[FileDetector, CustomDataset]:
    "A network that gives 8*mean - 4 of its input, and two white pictures with a black square."
    mean = helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2, 3], keepdims=0)
    scale = [numpy_helper.from_array(np.float32(value), name) for name, value in (("eight", 8.0), ("four", 4.0))]
    nodes = [mean, helper.make_node("Mul", ["m", "eight"], ["s"]), helper.make_node("Sub", ["s", "four"], ["y"])]
    side = keys["input_size"]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("B", 3, side, keys.get("width", side)))]
    graph = helper.make_graph(nodes, "mean", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], scale)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path/"mean.onnx")
    write_yaml(tmp_path/"mean.onnx", **dict(mean=[0, 0, 0], std=[1, 1, 1]) | keys)
    picture = np.full((1000, 1000, 3), 255, np.uint8)
    picture[300:700, 300:700] = 0
    for name in ("real/a.png", "synthetic/gan/b.png"): save(picture, tmp_path/"pictures"/name)
    return load_custom_detector(str(tmp_path/"mean.onnx")), read_custom_dataset(tmp_path/"pictures")


def square_score(tmp_path: Path, **keys) -> tuple[float, float]:
    "Logits of a white picture with a black square, through `predict` and `evaluate`."
    detector, pictures = squares(tmp_path, **keys)
    scorer = Scorer(detector, Settings(views=False))
    row, = score_files([tmp_path/"pictures"/"real"/"a.png"], scorer)
    if detector.settings.fit == "resize": found = judge(detector, pictures, resamples=10, num_workers=0).predictions
    else: found = predict(detector, pictures.manifest, pictures.root, num_workers=0) # without the tables, to save time
    return row["logit"], float(found["logit"].iloc[0])


# 16 % of the picture are black, so the mean is 0.84; a crop of 224 pixels lies in the square, those at the corners outside it
@pytest.mark.parametrize("keys, mean", [
    (dict(input_size=224), 0.0), (dict(input_size=224, fit="crops"), 0.8), (dict(input_size=224, fit="resize"), 0.84),
    (dict(input_size=224, fit="resize", short_side=448), 0.36), (dict(input_size=200, width=300, fit="squash"), 0.84),
    (dict(input_size=None, fit="own"), 0.84)], ids=lambda value: value.get("fit", "crop") if isinstance(value, dict) else "")
def test_predict_and_evaluate_show_what_the_yaml_says(tmp_path, keys, mean):
    assert square_score(tmp_path, **keys) == pytest.approx([8*mean - 4]*2, abs=0.05)


@pytest.mark.parametrize("file, keys, theirs", [
    ("net.onnx", dict(fit="resize", short_side=40, input_size=32), [v2.Resize(40), v2.CenterCrop(32)]),
    ("net.pt", dict(fit="squash", input_size=32, width=48, interpolation="bicubic"), [v2.Resize((32, 48), InterpolationMode.BICUBIC)])],
    ids=["ONNX", "TorchScript"])
@pytest.mark.filterwarnings("ignore:.torch.jit.load")
def test_probabilities_are_those_of_the_author_s_own_pipeline(tmp_path, file, keys, theirs):
    "Five shapes, through `predict` and as `evaluate` scores: torchvision prepares, and the runtime runs the file without this package."
    torch.manual_seed(0)
    net, draw = Net().eval(), np.random.default_rng(0)
    with torch.no_grad(): net.head.weight *= 20
    path = write_onnx(tmp_path/file, net) if file == "net.onnx" else write_script(tmp_path/file, net, "script")
    detector, expected, files = load_custom_detector(str(write_yaml(path, **keys)), trust=True), [], []
    run = torch.jit.load(path) if file == "net.pt" else lambda x: torch.from_numpy(InferenceSession(path).run(None, {"x": x.numpy()})[0])
    prepare = v2.Compose([v2.ToImage(), *theirs, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    for number, (height, width) in enumerate([(32, 32), (50, 70), (300, 90), (41, 200), (640, 481)]):
        ramp = np.linspace(0, 200, width)[None, :, None]*np.linspace(0.2, 1, height)[:, None, None]*draw.uniform(0.2, 1, 3)
        files.append(tmp_path/"pictures"/("real", "synthetic/gan")[number % 2]/f"{number}.png")
        save(np.clip(ramp + draw.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8), files[-1])
        with Image.open(files[-1]) as picture, torch.no_grad(): expected.append(float(run(prepare(picture)[None]).sigmoid()))
    assert np.ptp(expected) > 0.05 # the pictures are told apart, so equal numbers mean something
    rows = score_files(files, Scorer(detector, Settings(views=False)), readers=0)
    assert [row["probability"] for row in rows] == pytest.approx(expected, abs=1e-3)
    manifest = read_custom_dataset(tmp_path/"pictures").manifest
    found = predict(detector, manifest, tmp_path/"pictures", num_workers=0).set_index("path")["probability"]
    assert [found[path.relative_to(tmp_path/"pictures").as_posix()] for path in files] == pytest.approx(expected, abs=1e-3)


# of the middle 500 x 500 pixels 64 % are black; a grid of central squares would have shown black alone, or a shift of nothing at all
@pytest.mark.parametrize("keys", [dict(input_size=200, width=300, fit="squash"), dict(input_size=None, fit="own")], ids=["squash", "own"])
def test_the_grid_corrupts_whole_pictures_for_a_detector_that_is_shown_them(tmp_path, keys):
    detector, pictures = squares(tmp_path, **keys)
    found = judge(detector, pictures, robustness=2, resamples=10, num_workers=0)
    table, caption = found.tables["robustness_shift"]
    real = table[table["group"].eq("real")].set_index(["perturbation", "value"])["shift"]
    assert len(real) == 17 and real["crop", 50] == pytest.approx(8*(0.36 - 0.84), abs=0.05)
    assert real["resize", 4] == pytest.approx(0, abs=0.05) and "Whole pictures were corrupted; of each the detector was shown" in caption


def test_pictures_that_a_codec_cannot_hold_are_missing_at_its_points_alone(tmp_path, monkeypatch):
    "An evaluation that ended, after all its work, at one picture of 20,000 pixels; or a table that does not say that it is missing."
    detector, _ = squares(tmp_path, input_size=20, fit="squash")
    for side, name in ((20_000, "real/long.png"), (70_000, "synthetic/gan/longer.png")):
        save(np.full((16, side, 3), 255, np.uint8), tmp_path/"pictures"/name)
    scored = {("jpeg", 80): 3, ("webp", 40): 2, ("avif", 40): 3, ("resize", 2): 4, ("screenshot", 125): 3}
    monkeypatch.setattr("imaginet_nb.apps.evaluate.grid_points", lambda: list(scored))
    found = judge(detector, read_custom_dataset(tmp_path/"pictures"), robustness=8, resamples=10, num_workers=0)
    table = found.tables["robustness_loss"][0].set_index(["perturbation", "value"])
    assert found.predictions["error"].isna().all() and table["n"].to_dict() == scored
    assert table["note"].tolist() == [unscored_note(4 - n) for n in scored.values()]


def test_what_is_shown_belongs_to_the_fingerprint(net, tmp_path):
    "The same network with another `fit`: other rows."
    def fingerprint(**keys):
        write_yaml(write_onnx(tmp_path/"net.onnx", net), **keys)
        return Scorer(load_custom_detector(str(tmp_path/"net.onnx"))).made_with["detector"]
    assert len({fingerprint(**keys) for keys in ({}, {"fit": "resize"}, {"fit": "squash"}, {"fit": "squash", "antialias": False})}) == 4
