"""NAG on tiny random models of each family; run with ComfyUI's Python: comfy_nag.py COMFYUI_DIR FAMILY...

The slow twin runs the positive and the negative text as two samples of one batch, with the same picture, and gives both the
joined answer at the picture's rows: two whole passes, written without the pack. Prints one JSON line per family, differences in
parts of the largest value.
"""

import json
import sys

FAMILIES = sys.argv[2:]
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]  # ComfyUI reads the command line on import

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

from types import SimpleNamespace  # noqa: E402

import comfy.conds  # noqa: E402
import torch  # noqa: E402
from comfy_families import filled, made  # noqa: E402

import genattn.apps.comfyui.patching.nag as pack  # noqa: E402
import genattn.apps.comfyui.patching.seam as seam  # noqa: E402
from genattn.apps.comfyui.patching.chain import Chain  # noqa: E402
from genattn.guidance.nag.formula import Strength  # noqa: E402
from genattn.patterns.neighborhood import NeighborhoodPattern  # noqa: E402
from genattn.seam.schedule import Schedule  # noqa: E402
from genattn.seam.sparse_plugin import SparsePlugin  # noqa: E402

SCALE, TAU, ALPHA = 3.0, 1.1, 0.7
STRENGTH = Strength(SCALE, TAU, ALPHA)


class Case:
    """A family's model with a positive and a negative text."""

    def __init__(self, family):
        torch.manual_seed(5)
        self.family, masked = family.removesuffix("-masked"), family.endswith("-masked")
        self.model, shape, text, extras = made(self.family)
        filled(self.model)
        self.extras = {name: value for name, value in extras.items() if name != "attention_mask"}
        self.several = isinstance(shape, list)
        self.latents = [torch.randn(part) for part in shape] if self.several else torch.randn(shape)
        self.positive, self.negative = torch.randn(text), torch.randn(text)
        self.masks = (None, None)
        if masked:
            self.masks = tuple(torch.ones(1, text[1], dtype=torch.long) for _ in range(2))
            self.masks[0][:, -2:] = 0
            self.masks[1][:, :1] = 0

    def forward(self, latents, context, options, mask=None, **extras):
        """The model's own forward."""
        batch = len(context)
        many = [t.expand(batch, *t.shape[1:]).clone() for t in (latents if self.several else [latents])]
        given = {name: self.wide(value, batch) for name, value in {**self.extras, **extras}.items()}
        if mask is not None or self.family.startswith("ltx"):
            given["attention_mask"] = mask
        out = self.model(
            many if self.several else many[0], torch.full((batch,), 500.0), context=context,
            transformer_options=dict(options), **given,
        )  # fmt: skip
        return torch.cat([part.flatten(1) for part in out], 1) if self.several else out

    def wide(self, value, batch):
        """Extras for a batch."""
        if isinstance(value, list):
            return [self.wide(part, batch) for part in value]
        return value.expand(batch, *value.shape[1:]) if isinstance(value, torch.Tensor) else value

    def stock(self):
        """The unpatched model with the positive text."""
        return self.forward(self.latents, self.positive, {"sample_sigmas": torch.tensor([1.0, 0.0])}, self.masks[0])

    def twin(self):
        """Both texts as two samples that see one picture."""
        sizes = {}

        def double(args, extra):
            sizes["text"], sizes["picture"] = args["txt"].shape[1], args["img"].shape[1]
            return extra["original_block"](args)

        def over_text(func, q, k, v, heads, *rest, **options):
            out = func(q, k, v, heads, *rest, **options)
            axis = 2 if options.get("skip_reshape") else 1
            asked, shown = q.shape[axis], k.shape[axis]
            if self.joint:
                if not sizes or asked != sizes["text"] + sizes["picture"]:
                    return out
                first = pack.text_stands_first(self.model)
                rows = slice(sizes["text"], None) if first else slice(0, sizes["picture"])
            elif asked == shown or shown != self.positive.shape[1]:
                return out
            else:
                rows = slice(None)
            at = (slice(None),) * (2 if options.get("skip_output_reshape") else 1) + (rows,)
            plus, minus = out[at][:1].double(), out[at][1:].double()
            pushed = SCALE * plus - (SCALE - 1) * minus
            channels = (1, 3) if options.get("skip_output_reshape") else (2,)
            ratio = pushed.abs().sum(channels, keepdim=True) / plus.abs().sum(channels, keepdim=True)
            joined = ALPHA * pushed * ratio.clamp(max=TAU) / ratio + (1 - ALPHA) * plus
            out = out.clone()
            out[at] = joined.to(out).expand(2, *joined.shape[1:])
            return out

        dit = {("double_block", i): double for i in range(8)} if self.joint else {}
        options = {seam.OVERRIDE: over_text, "patches_replace": {"dit": dit}, "sample_sigmas": torch.tensor([1.0, 0.0])}
        mask = None if self.masks[0] is None else torch.cat(self.masks)
        return self.forward(self.latents, torch.cat([self.positive, self.negative]), options, mask)[:1]

    @property
    def joint(self):
        """Whether text and picture share one attention."""
        return pack.text_way_of(self.model).kind == "joint"

    def nag(self, negative, strength=STRENGTH, chunks=(0,), plugins=(), mask=None, sigma=1.0):
        """The model with the pack's NAG, through its wrappers, as ComfyUI's apply_model calls them."""
        case = self

        class Executor:
            class_obj = SimpleNamespace(diffusion_model=self.model)

            def original(self, x, t, concat, context, control, options, **more):
                more.pop("latent_shapes", None)
                masks = {"mask": more.pop("attention_mask", None)}
                return case.forward(x if not case.several else case.latents, context, options, **masks, **more)

            __call__ = original

        class Outer(Executor):
            """The wrapper of sparse attention and guidance stands inside that of NAG."""

            def __call__(self, *args, **more):
                return seam.around_model(Executor(), *args, **more) if plugins else Executor()(*args, **more)

        known = pack.Nag(None, strength, 2.0, 0.5)
        conds = {"c_crossattn": comfy.conds.CONDRegular(negative)}
        if mask is not None:
            conds["attention_mask"] = comfy.conds.CONDRegular(mask)
        known._guider = SimpleNamespace(conds={pack.KEY: [{"model_conds": conds}]})
        options = {pack.KEY: known, "sigmas": torch.full((1,), sigma), "sample_sigmas": torch.tensor([1.0, 0.0])}
        options |= {"cond_or_uncond": list(chunks)}
        seam.stand_in_slot(options)
        chain = Chain(tuple(plugins))
        if plugins:
            options[seam.KEY] = chain
        shapes = {"latent_shapes": [list(part.shape) for part in self.latents]} if self.several else {}
        latents = torch.cat([part.flatten(1) for part in self.latents], 1)[:, None] if self.several else self.latents
        batch = len(chunks)
        masks = {} if self.masks[0] is None else {"attention_mask": self.masks[0].expand(batch, -1)}
        out = pack.around_model(
            Outer(), latents.expand(batch, *latents.shape[1:]), torch.full((batch,), 500.0), None,
            self.positive.expand(batch, -1, -1), None, options, **self.extras, **shapes, **masks,
        )  # fmt: skip
        return out, known, chain


def apart(one, other):
    """The largest difference in parts of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


@torch.inference_mode()
def checked(family):
    """What must hold, in numbers."""
    case = Case(family)
    stock = case.stock()
    guided, known, _ = case.nag(case.negative, mask=case.masks[1])
    row = {
        "finite": bool(torch.isfinite(guided).all()),
        "changed": apart(guided, stock),
        "same_text": apart(case.nag(case.positive, mask=case.masks[0])[0], stock),
        "off": bool(torch.equal(case.nag(case.negative, Strength(1.0))[0], stock)),
        "outside": bool(torch.equal(case.nag(case.negative, sigma=0.25)[0], stock)),
        "calls": known.calls,
    }
    if family != "hunyuan-masked":  # ComfyUI's own model takes no batch of two with a mask
        pair, _, _ = case.nag(case.negative, chunks=(0, 1), mask=case.masks[1])
        row |= {"twin": apart(guided, case.twin()), "guided_of_pair": apart(pair[:1], guided)}
        row["unconditional_of_pair"] = apart(pair[1:], stock)
    if family not in ("unet",):
        full = SparsePlugin(NeighborhoodPattern(-1, tail=None), Schedule(dense_steps=0, dense_layers=0))
        with_sparse, _, chain = case.nag(case.negative, plugins=(full,), mask=case.masks[1])
        row["under_full_window"] = apart(with_sparse, guided)
        stats = chain.tally.stats.values()
        row["sparse"] = [sum(stat.sparse for stat in stats), sum(stat.calls for stat in stats)]
        row["reasons"] = sorted({reason for stat in stats for reason in stat.row()["dense_reasons"]})
    return row


for name in FAMILIES:
    try:
        print(json.dumps({"family": name, **checked(name)}), flush=True)
    except ModuleNotFoundError as error:
        print(json.dumps({"family": name, "absent": str(error)}), flush=True)
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(json.dumps({"family": name, "error": f"{type(error).__name__}: {error}"}), flush=True)
