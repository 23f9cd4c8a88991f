#!/bin/bash
# Filled by the site's agent for each BatchJob and started by deephyper_balsam.sites.local.LocalScheduler.
{%- set search = optional_params.get("search") -%}
{%- macro q(text) -%}'{{ (text | string) | replace("'", "'\\''") }}'{%- endmacro %}
export BALSAM_SITE_PATH={{ q(balsam_site_path) }}
cd "$BALSAM_SITE_PATH" || exit 1

# exec: a signal to the job reaches the launcher itself, which stops its runs in order
exec "${DEEPHYPER_BALSAM_PYTHON:-python}" -m deephyper_balsam.launcher.{{ "inside" if search else "main" }} --loopback --poll-s 0.25 \
    -j {{ (job_mode | string) | replace("JobMode.", "") }} -t {{ wall_time_min }}
    {%- for key, value in (filter_tags or {}).items() %} --tag {{ q(key ~ "=" ~ value) }}{% endfor %}
    {%- for part in (partitions or "").split(" --part ")[1:] %} --part {{ q(part | replace("JobMode.", "")) }}{% endfor %}
    {%- if search %} --chain {{ optional_params.get("chain") or 0 }} {{ q(search) }}{% endif %}
