// A libcuda.so.1 that records launches and runs nothing. It has the part of the driver API that Triton's launcher uses.
//
//   cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o libcuda.so.1 recording_cuda.c
//
// A line of `recorded_launches` is NAME|GRID|BLOCK|SHARED|STREAM|ATTRIBUTES|SIZE:VALUE,... with all parameters of the
// kernel, whose number and sizes come from the cubin's .nv.info section, where the driver finds them, too. The value of a
// tensor map is its address, and SIZE is 128-SUM with a checksum of its dimensions, strides, box and swizzle.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef void* Handle;
enum { SUCCESS = 0, MOST_FUNCTIONS = 4096, MOST_PARAMETERS = 128 };

static int major_version = 8, minor_version = 6;

void set_capability(int major, int minor) {
  major_version = major;
  minor_version = minor;
}

// --- device, context and stream: functions that do nothing or return a constant ---
#define NOTHING(name) \
  Result name(void) { return SUCCESS; }
#define ANSWER(name, type, value) \
  Result name(type* answer) { return *answer = value, SUCCESS; }
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuModuleUnload)
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig)
NOTHING(cuTensorMapEncodeIm2col)
ANSWER(cuDriverGetVersion, int, 13000) ANSWER(cuDeviceGetCount, int, 1) ANSWER(cuCtxGetDevice, int, 0)
ANSWER(cuDevicePrimaryCtxRetain, Handle, (Handle)1) ANSWER(cuCtxGetCurrent, Handle, (Handle)1)
ANSWER(cuCtxGetLimit, size_t, 1 << 20) ANSWER(cuOccupancyMaxActiveClusters, int, 1)
Result cuGetErrorString(Result error, const char** text) { return *text = "recorded", SUCCESS; }
Result cuDeviceGet(int* device, int index) { return *device = index, SUCCESS; }
Result cuStreamIsCapturing(Handle stream, int* status) { return *status = 0, SUCCESS; }
Result cuPointerGetAttribute(void* out, int attribute, uint64_t pointer) { return *(uint64_t*)out = pointer, SUCCESS; }

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  int large = major_version == 9 || major_version == 10, a100 = major_version == 8 && minor_version == 0;
  switch (attribute) {
    case 97: *value = large ? 232448 : a100 ? 166912 : 101376; break;  // shared memory of a block
    case 81: *value = 102400; break;  // shared memory of a multiprocessor
    case 75: *value = major_version; break;
    case 76: *value = minor_version; break;
    default: *value = 1;
  }
  return SUCCESS;
}

Result cuTensorMapEncodeTiled(uint64_t* map, int type, uint32_t rank, void* address, const uint64_t* dimensions,
                              const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                              int swizzle, int promotion, int fill) {
  uint64_t sum = (uint64_t)(((type * 8 + interleave) * 8 + swizzle) * 8 + promotion) * 8 + fill;
  for (uint32_t i = 0; i < rank; ++i) {
    uint64_t values[] = {dimensions[i], i + 1 < rank ? strides[i] : 0, box[i], steps[i]};
    for (int j = 0; j < 4; ++j) sum = sum * 1000003 + values[j];
  }
  memset(map, 0, 128);
  map[0] = (uint64_t)address;
  map[1] = sum;
  return SUCCESS;
}

// --- modules: a module's handle is the cubin itself, a function's handle is its index ---
static struct {
  char name[256];
  int count;
  int sizes[MOST_PARAMETERS];
} functions[MOST_FUNCTIONS];
static int function_count = 1;

static uint64_t read64(const uint8_t* at) {
  uint64_t value;
  memcpy(&value, at, sizeof value);
  return value;
}
static uint32_t read32(const uint8_t* at) { return (uint32_t)(read64(at) & 0xffffffff); }
static uint16_t read16(const uint8_t* at) { return (uint16_t)(read64(at) & 0xffff); }

// Entries of .nv.info have a format, an attribute and a length or a value. 0x17 is one parameter's place and size.
static void read_parameters(const uint8_t* at, const uint8_t* end, int function) {
  while (at < end) {
    uint8_t format = at[0], attribute = at[1];
    uint16_t length = read16(at + 2);
    at += 4;
    if (format != 4) continue;
    if (attribute == 0x17) {
      uint16_t place = read16(at + 4);
      functions[function].sizes[place] = (int)(read32(at + 8) >> 18);
      if (place + 1 > functions[function].count) functions[function].count = place + 1;
    }
    at += length;
  }
}

Result cuModuleLoadData(Handle* module, const void* image) { return *module = (Handle)image, SUCCESS; }

Result cuModuleGetFunction(Handle* function, Handle module, const char* name) {
  const uint8_t* elf = module;
  const uint8_t* headers = elf + read64(elf + 40);
  int size = read16(elf + 58), count = read16(elf + 60), names_section = read16(elf + 62);
  const char* names = (const char*)(elf + read64(headers + names_section * size + 24));
  int id = function_count++;
  snprintf(functions[id].name, sizeof functions[id].name, "%s", name);
  char wanted[300];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  for (int i = 0; i < count; ++i) {
    const uint8_t* header = headers + i * size;
    if (strcmp(names + read32(header), wanted) != 0) continue;
    const uint8_t* start = elf + read64(header + 24);
    read_parameters(start, start + read64(header + 32), id);
  }
  *function = (Handle)(intptr_t)id;
  return SUCCESS;
}

Result cuFuncGetAttribute(int* value, int attribute, Handle function) {
  return *value = attribute == 0 ? 1024 : 0, SUCCESS;
}

// --- launches ---
typedef struct {
  unsigned grid[3], block[3], shared;
  Handle stream;
  void* attributes;
  unsigned attribute_count;
} Config;

static char* launches;
static size_t length, capacity;

static void append(const char* text) {
  size_t added = strlen(text);
  if (length + added + 1 > capacity) launches = realloc(launches, capacity = 2 * (length + added + 1));
  memcpy(launches + length, text, added + 1);
  length += added;
}

Result cuLaunchKernelEx(const Config* config, Handle function, void** parameters, void** extra) {
  int id = (int)(intptr_t)function;
  char text[512];
  const unsigned *g = config->grid, *b = config->block;
  snprintf(text, sizeof text, "%s|%u,%u,%u|%u,%u,%u|%u|%lu|%u|", functions[id].name, g[0], g[1], g[2], b[0], b[1], b[2],
           config->shared, (unsigned long)config->stream, config->attribute_count);
  append(text);
  for (int i = 0; i < functions[id].count; ++i) {
    int size = functions[id].sizes[i];
    uint64_t words[2] = {0};
    memcpy(words, parameters[i], size > 16 ? 16 : size);
    int printed = snprintf(text, sizeof text, "%d", size);
    if (size == 128) printed += snprintf(text + printed, sizeof text - printed, "-%lx", (unsigned long)words[1]);
    snprintf(text + printed, sizeof text - printed, ":%lx,", (unsigned long)words[0]);
    append(text);
  }
  append("\n");
  return SUCCESS;
}

const char* recorded_launches(void) { return launches ? launches : ""; }
void forget_launches(void) {
  length = 0;
  if (launches) launches[0] = 0;
}
