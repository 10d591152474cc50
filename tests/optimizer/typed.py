"""What type checkers know of the keywords: where a wrong one passes, its `type: ignore` is unused, and `make lint` fails."""

import torch

import fused_opt

weight = torch.nn.Parameter(torch.ones(2))
ema = fused_opt.EMA(0.9)

fused_opt.SGD([weight], max_grad_norm=1.0, averaging=ema, nonfinite="skip", trust_ratio=fused_opt.TrustRatio("lars"))
fused_opt.CLARS([weight], lr=1.0, averaging=ema, cap=None, maximize=True, backend="native").track_parts("sample")
fused_opt.LAMB([weight], averaging=ema, amsgrad=True)
averaging: fused_opt.Averaging = ema

fused_opt.SGD([weight], max_gradnorm=1.0)  # type: ignore[call-arg]
fused_opt.AdamW([weight], nonfinite="stop")  # type: ignore[arg-type]
fused_opt.CLARS([weight], lr=1.0, averaging=0.9)  # type: ignore[arg-type]
fused_opt.CLARS([weight], lr=1.0, betas=(0.9, 0.99))  # type: ignore[call-arg]
fused_opt.LARS([weight], lr=1.0, trust_ratio=None)  # type: ignore[call-arg]
fused_opt.LAMB([weight], nesterov=True)  # type: ignore[call-arg]
fused_opt.CLARS([weight], lr=1.0).track_parts("samples")  # type: ignore[arg-type]
fused_opt.TrustRatio("larc")  # type: ignore[arg-type]
fused_opt.WeightNoise(std=0.1, schedule="cosine")  # type: ignore[arg-type]
fused_opt.EMA(0.9, on_write_back="drop")  # type: ignore[arg-type]
