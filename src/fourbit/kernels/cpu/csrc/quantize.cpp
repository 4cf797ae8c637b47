// The kernels of one instruction set, one operation per file. Compiled once per instruction set (FOURBIT_ISA names it).
#include "clip.h"
#include "epilogue.h"
#include "float_round.h"
#include "log_round.h"
#include "moments.h"
#include "split.h"
#include "table_round.h"
#include "unpack.h"

namespace fourbit {

extern const Table FOURBIT_JOIN(FOURBIT_ISA, _table) = {
    clip,  log_round, float_round,               table_round,                unpack, epilogue,
    split, moments,   FOURBIT_ISA::norm_statistics, FOURBIT_ISA::norm_apply, FOURBIT_ISA::norm_backward,
    FOURBIT_JOIN(FOURBIT_ISA, _accumulate), FOURBIT_ISA::lstm_forward, FOURBIT_ISA::lstm_backward,
    FOURBIT_ISA::round_tiles, FOURBIT_ISA::unpack_tiles};

}  // namespace fourbit
