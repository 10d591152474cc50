// Steps in float32 that round to the nearest.
#include "kernels.h"

namespace fused_opt::cuda {

#define FUSED_OPT_UPDATE(name, Rule) update_kernel<Rule, float, false>,
const Kernel kUpdates[] = {FUSED_OPT_RULES(FUSED_OPT_UPDATE)};

}  // namespace fused_opt::cuda
