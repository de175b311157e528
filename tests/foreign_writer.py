# SPDX-License-Identifier: Apache-2.0
"""Write ONNX files of a sentence-transformers directory with optimum and with sentence-transformers' own backend.

Run by another Python (``python foreign_writer.py DIRECTORY OUTPUT``): optimum exports with versions of transformers
that the library is not installed beside. Tried: optimum 1.27.0, transformers 4.57.3, sentence-transformers 4.1.0,
onnxslim 0.1.98 and onnxconverter-common 1.16.0, beside torch 2.13 and ONNX Runtime 1.32. `foreign_files.py` judges
what it writes.
"""

import importlib
import sys
import warnings
from pathlib import Path

import torch

MOVED = ("symbolic_opset9", "symbolic_opset11", "symbolic_opset14", "symbolic_opset17", "symbolic_opset18")


def as_before_torch_2_9():
    """Put the modules that optimum imports where they were, and export by TorchScript unless told otherwise."""
    for name in (*MOVED, "symbolic_helper", "utils"):
        module = importlib.import_module(f"torch.onnx._internal.torchscript_exporter.{name}")
        sys.modules[f"torch.onnx.{name}"] = module
        if name != "utils":
            setattr(torch.onnx, name, module)
    export = torch.onnx.export
    torch.onnx.export = lambda *args, **options: export(*args, **{"dynamo": False, **options})


def exported(source, output, **options):
    from optimum.exporters.onnx import main_export

    main_export(source, output, task="feature-extraction", do_validation=False, no_post_process=True, **options)


def saved(source, output, step):
    import sentence_transformers

    options = {"export": True, "provider": "CPUExecutionProvider"}
    model = sentence_transformers.SentenceTransformer(source, backend="onnx", device="cpu", model_kwargs=options)
    step(sentence_transformers, model, str(output))


def slimmed(source, output):
    import onnx
    import onnxslim

    exported(source, output, library_name="transformers", opset=14)
    onnx.save(onnxslim.slim(onnx.load(output / "model.onnx")), output / "model.onnx")


def halved(source, output, keep):
    import onnx
    from onnxconverter_common.float16 import convert_float_to_float16

    exported(source, output, library_name="transformers", opset=14)
    path = output / "model.onnx"
    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=keep), path)


WRITERS = {
    "optimum, opset 14": lambda a, b: exported(a, b, library_name="transformers", opset=14),
    "optimum, opset 17": lambda a, b: exported(a, b, library_name="transformers", opset=17),
    "optimum, of the whole directory": lambda a, b: exported(a, b, library_name="sentence_transformers", opset=14),
    "optimum, O1": lambda a, b: exported(a, b, library_name="transformers", opset=14, optimize="O1"),
    "optimum, O2": lambda a, b: exported(a, b, library_name="transformers", opset=14, optimize="O2"),
    "optimum, O3": lambda a, b: exported(a, b, library_name="transformers", opset=14, optimize="O3"),
    "sentence-transformers' backend": lambda a, b: saved(a, b, lambda _, model, path: model.save_pretrained(path)),
    "sentence-transformers' backend, O1": lambda a, b: saved(
        a, b, lambda st, model, path: st.export_optimized_onnx_model(model, "O1", path)
    ),
    "sentence-transformers' backend, O3": lambda a, b: saved(
        a, b, lambda st, model, path: st.export_optimized_onnx_model(model, "O3", path)
    ),
    "sentence-transformers' backend, int8": lambda a, b: saved(
        a, b, lambda st, model, path: st.export_dynamic_quantized_onnx_model(model, "avx2", path)
    ),
    "onnxslim": slimmed,
    "onnxconverter-common, float16 within": lambda a, b: halved(a, b, True),
    "onnxconverter-common, float16 throughout": lambda a, b: halved(a, b, False),
}


def main():
    source, output = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore")
    as_before_torch_2_9()
    for name, write in WRITERS.items():
        folder = output / name
        if not folder.is_dir():
            folder.mkdir(parents=True)
            write(source, folder)


if __name__ == "__main__":
    main()
