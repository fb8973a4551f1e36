"""An export format as somebody else would add it, NumPy's files: ``--plugin plugin_export``."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qat.export.formats import EXPORT_FORMATS, ExportFormat
from qat.quant.number_format import Quantized
from qat.quant.products import speed_up
from qat.store.model_folder import ModelFolder, write_companions


class Npz(ExportFormat):
    meaning = "codes and scales as NumPy has them"
    weight_files = "*.npz"

    def write(self, student, output, file_bytes):
        arrays = {}
        for name, weight in student.progress():
            if isinstance(weight, Quantized):
                arrays[f"{name}/codes"], arrays[f"{name}/scale"] = weight.codes.numpy(), weight.grid.scale.numpy()
            else:
                arrays[name] = weight.numpy()
        np.savez(output / "weights.npz", **arrays)
        write_companions(ModelFolder.read(student.directory).companions(), output)

    def load(self, exported):
        arrays = {name: torch.from_numpy(array) for name, array in np.load(exported / "weights.npz").items()}
        weights = {name: array for name, array in arrays.items() if "/" not in name}
        for name in arrays:
            if name.endswith("/codes"):
                layer = name.removesuffix("/codes")
                weights[layer] = arrays[name].float() * arrays[f"{layer}/scale"]
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(exported))
        model.load_state_dict(weights, strict=False)
        speed_up(model)
        return model.eval()

    def serve(self, name):
        return [f"my_engine {name}/weights.npz"]


EXPORT_FORMATS.add("npz", Npz())
