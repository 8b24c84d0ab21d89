-- Put in front of every script that writes to {trust}:*. A refusal is an error reply with a stable first word, made
-- before anything is written.

local function field(info, name)
  return string.match(info, name .. ':([^\r\n]*)')
end

-- The server's replication id, or nil and an error reply if it is not a master.
local function master_replid()
  local info = redis.call('INFO', 'replication')
  if field(info, 'role') ~= 'master' then
    return nil, redis.error_reply('TRUST_NOT_PRIMARY the server is not a master')
  end
  return field(info, 'master_replid')
end

-- nil if the caller may write in the epoch (number, nonce) that it believes in; otherwise an error reply.
local function check_epoch(epoch_key, number, nonce)
  local replid, refusal = master_replid()
  if not replid then
    return refusal
  end
  local held = redis.call('HMGET', epoch_key, 'number', 'nonce', 'replid')
  if not held[1] then
    return redis.error_reply('TRUST_NO_EPOCH there is no epoch')
  end
  if held[3] ~= replid then
    return redis.error_reply('TRUST_REPLID the server has another replication id than the epoch')
  end
  if held[1] ~= number or held[2] ~= nonce then
    return redis.error_reply('TRUST_EPOCH another epoch is current')
  end
  return nil
end

local function server_ms()
  local time = redis.call('TIME')
  return string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
end

-- A list of epochs as JSON: an empty table would be written as an object.
local function encode_links(links)
  return #links == 0 and '[]' or cjson.encode(links)
end

local function decode_links(text)
  return cjson.decode(text or '[]')
end

-- The newest beat that a majority of the voters has confirmed, by the rule of keyservice.core.evidence, or nil.
local function confirmed_beat(voters, number, nonce)
  local seats, reached = 0, {}
  for region, keeper_id in pairs(cjson.decode(voters)) do
    seats = seats + 1
    local report = redis.call('HMGET', '{trust}:region:' .. region, 'keeper_id', 'number', 'nonce', 'beat_n', 'beat_at',
      'beat_position')
    local n = tonumber(report[4] or '-1')
    if keeper_id ~= '' and report[1] == keeper_id and report[2] == number and report[3] == nonce and n >= 0 then
      table.insert(reached, {n = n, at = report[5], position = report[6]})
    end
  end
  table.sort(reached, function(a, b) return a.n > b.n end)
  return reached[math.floor(seats / 2) + 1]
end

-- The highest number of a beat of this epoch that a region has reported, -1 for none. Where the beat itself was deleted,
-- counting goes on above it: for readers and keepers a lower number is an old beat.
local function newest_reported_beat(voters, nonce)
  local newest = -1
  for region in pairs(cjson.decode(voters)) do
    local report = redis.call('HMGET', '{trust}:region:' .. region, 'nonce', 'beat_n')
    if report[1] == nonce then
      newest = math.max(newest, tonumber(report[2] or '-1'))
    end
  end
  return newest
end

-- Say how far the log goes and which beat is confirmed. The caller has checked the epoch.
local function write_beat(beat_key, epoch_key, log_key, number, nonce, now_ms)
  local held = redis.call('HMGET', beat_key, 'nonce', 'n')
  local last = redis.call('XREVRANGE', log_key, '+', '-', 'COUNT', 1)[1]
  local epoch = redis.call('HMGET', epoch_key, 'open', 'voters', 'keys_n')
  local before = held[1] == nonce and tonumber(held[2]) or newest_reported_beat(epoch[2] or '{}', nonce)
  local n = string.format('%.0f', before + 1)
  local confirmed = epoch[1] == '1' and confirmed_beat(epoch[2] or '{}', number, nonce)
  redis.call('HSET', beat_key, 'nonce', nonce, 'n', n, 'at', now_ms, 'position', last and last[1] or number .. '-0',
    'generation', number .. '-' .. (epoch[3] or '0'))
  if confirmed then
    redis.call('HSET', beat_key, 'confirmed_n', string.format('%.0f', confirmed.n), 'confirmed_at', confirmed.at,
      'confirmed_position', confirmed.position)
  else
    redis.call('HDEL', beat_key, 'confirmed_n', 'confirmed_at', 'confirmed_position')
  end
end

-- nil if every verifier that calls itself fresh knows this format; otherwise an error reply.
local function check_readers(meta_key, format)
  if not meta_key or tonumber(redis.call('HGET', meta_key, 'min_reader_format') or '0') < format then
    return redis.error_reply('TRUST_READERS verifiers need not know this kind yet: raise min_reader_format first')
  end
  return nil
end
