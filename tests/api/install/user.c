/* The library's version through the installed C header. */
#include <heed/heed.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  heed_device device;
  const heed_status status = heed_device_cpu(&device);
  printf("heed %s, %s\n", heed_version(), status.code == HEED_OK ? "ok" : status.message);
  return status.code == HEED_OK && strcmp(heed_version(), HEED_VERSION) == 0 ? 0 : 1;
}
