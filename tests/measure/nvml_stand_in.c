/* Answers like NVIDIA's libnvidia-ml.so.1 for one made-up board, so that the real pynvml binding can be tested without
   a GPU. Signatures: NVML API reference, nvml.h of driver 535. Power steps 100, 200, 300, 200 W … with every reading;
   the energy counter grows by 5 J with every reading. PTSIM_STAND_IN_LACKS names what the driver does not tell,
   PTSIM_STAND_IN_ODD what it tells wrongly: "power" a reading of 4 MW in every fourth place, "energy" a counter that jumps
   by 4 GJ, "mig" a UUID that is a slice's, "two" a second board; "moment" lets it tell the power of this moment, 250 W,
   "zero" 0 W for it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t;
typedef void *nvmlDevice_t;
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };

static int board;
static const char *UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef";

static int has(const char *feature) { /* PTSIM_STAND_IN_LACKS=energy,power … */
    const char *lacks = getenv("PTSIM_STAND_IN_LACKS");
    return lacks == NULL || strstr(lacks, feature) == NULL;
}

static int odd(const char *feature) {
    const char *list = getenv("PTSIM_STAND_IN_ODD");
    return list != NULL && strstr(list, feature) != NULL;
}

nvmlReturn_t nvmlInitWithFlags(unsigned flags) { (void)flags; return SUCCESS; }
nvmlReturn_t nvmlInit_v2(void) { return SUCCESS; }
nvmlReturn_t nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(nvmlReturn_t code) { return code == NOT_SUPPORTED ? "Not Supported" : "Not Found"; }

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    if (index != 0) return INVALID_ARGUMENT;
    *device = &board;
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    if (strcmp(uuid, odd("mig") ? "MIG-01234567-89ab-cdef-0123-456789abcdef" : UUID) != 0) return NOT_FOUND;
    *device = &board;
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) { *count = odd("two") ? 2 : 1; return SUCCESS; }
nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length) {
    if (device != &board) return INVALID_ARGUMENT;
    snprintf(name, length, "NVIDIA Stand-In 9000");
    return SUCCESS;
}
nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length) {
    snprintf(version, length, "535.104.05");
    return SUCCESS;
}

struct memory_v1 { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, struct memory_v1 *memory) {
    (void)device;
    memory->total = 16ull << 30; memory->used = 3ull << 30; memory->free = 13ull << 30;
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, struct memory_v2 *memory) {
    (void)device;
    if (!has("memory_v2")) return NOT_SUPPORTED;
    if (memory->version != (sizeof *memory | (2u << 24))) return INVALID_ARGUMENT;
    memory->total = 16ull << 30; memory->reserved = 1ull << 30; memory->used = 2ull << 30; memory->free = 13ull << 30;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts) {
    static const unsigned steps[] = {100000, 200000, 300000, 200000};
    static unsigned reading;
    (void)device;
    if (!has("power")) return NOT_SUPPORTED;
    *milliwatts = odd("power") && reading % 4 == 1 ? 4000000000u : steps[reading % 4];
    reading++;
    return SUCCESS;
}
/* 186: NVML_FI_DEV_POWER_INSTANT; every field has a return code of its own */
struct field { unsigned id, scope; long long timestamp, latency_us; int type, code; union { unsigned ui; double d; } value; };
nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, struct field *fields) {
    if (device != &board) return INVALID_ARGUMENT;
    for (int i = 0; i < count; i++) {
        int told = fields[i].id == 186 && fields[i].scope == 0 && (odd("moment") || odd("zero"));
        fields[i].code = told ? SUCCESS : NOT_SUPPORTED;
        if (told) fields[i].value.ui = odd("zero") ? 0 : 250000;
    }
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *millijoules) {
    static unsigned long long counter = 1000000;
    (void)device;
    if (!has("energy")) return NOT_SUPPORTED;
    *millijoules = counter += odd("energy") ? 4000000000000ull : 5000;
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned *milliwatts) {
    (void)device; *milliwatts = 350000; return SUCCESS;
}
/* clock types: 0 graphics, 1 SM, 2 memory; in MHz */
nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, int type, unsigned *mhz) {
    (void)device; *mhz = type == 2 ? 5000 : type == 1 ? 1410 : 1; return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, int type, unsigned *mhz) {
    (void)device; *mhz = type == 2 ? 6000 : type == 1 ? 1980 : 1; return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, int sensor, unsigned *celsius) {
    (void)device;
    if (sensor != 0) return INVALID_ARGUMENT;
    *celsius = 61; return SUCCESS;
}
struct utilization { unsigned gpu, memory; };
nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, struct utilization *rates) {
    (void)device; rates->gpu = 80; rates->memory = 40; return SUCCESS;
}
