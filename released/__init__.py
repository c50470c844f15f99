"""The released code of the methods: its sequence of PyTorch calls, in our own words.

Quirks are kept, with the Python loops, the reads of device values on the host, the new tensors and
the backward passes that only a log looks at: tests compare `official()` with these numbers, and
benchmarks measure these calls. TensorBoard, running losses and what else costs a step nothing is
left out. Two modalities, for MLB also three, found by their names, as there.

| module | method | repository | commit |
|---|---|---|---|
| `ogm` | OGM, OGM-GE (CVPR 2022) | GeWu-Lab/OGM-GE_CVPR2022 | 343dc1d |
| `opm` | OPM, alone and with OGM-GE (TPAMI 2024) | GeWu-Lab/BML_TPAMI2024 | 4b3aa4f |
| `inforeg` | InfoReg (CVPR 2025), both releases | GeWu-Lab/InfoReg_CVPR2025 | 939b2ed, b7524f8 |
| `redreg` | RedReg (2025) | xia-zhe/RedReg | b620a46 |
| `arm` | ARM (AAAI 2025) | Gao-xiyuan/ARM | a96d0ad |
| `mlb` | MLB (BMVC 2024) | kkontras/MLB | 357b5ce |
| `mmpareto` | MMPareto (ICML 2024) | GeWu-Lab/MMPareto_ICML2024 | a339db3 |
| `relearning` | ReLearning (ECCV 2024) | GeWu-Lab/Diagnosing_Relearning_ECCV2024 | 025085e |
| `pmr` | PMR (CVPR 2023) | fanyunfeng-bit/Modal-Imbalance-PMR | 3615e48 |
| `agm` | AGM (ICCV 2023) | lihong2303/AGM_ICCV2023 | 5a65542 |
| `arl` | ARL (ICCV 2025), both releases | shicaiwei123/ICCV2025-ARL | 51a9de3, adfc58c |
| `lfm` | LFM (NeurIPS 2024) | njustkmg/NeurIPS24-LFM | ad44fa0 |
| `mcr` | MCR (NeurIPS 2025) | kkontras/MCR | 338d370 |
| `mla` | MLA (CVPR 2024), both releases | as its file says | 4735bbc, ab6c184 |
| `cggm` | CGGM (NeurIPS 2024) | zrguo/CGGM | 21e428c |

`tests/golden/test_released_*.py` replay what the authors' own code has computed. Nothing here is
installed with mmfuse, and nothing here imports it.
"""
