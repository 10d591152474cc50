// Steps in float32 that round something at random.
#include "kernels.h"

namespace fused_opt::cuda {

#define FUSED_OPT_UPDATE(name, Rule) update_kernel<Rule, float, true>,
const Kernel kRoundingUpdates[] = {FUSED_OPT_RULES(FUSED_OPT_UPDATE)};

}  // namespace fused_opt::cuda
